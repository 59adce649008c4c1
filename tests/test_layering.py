"""The import graph and the module names are part of the design: both are checked, not remembered."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "fdfo_engine"
LAYERS = {
    "config": 0, "kernels": 0, "ops": 1, "runtime": 1, "shapes": 1, "models": 2, "choices": 2, "metrics": 2,
    "trajectory": 2, "rewards": 3, "rollout": 3, "update": 4, "report": 4, "algorithms": 5, "exporting": 5,
    "planning": 5, "engine": 6, "bench": 6, "evaluation": 7, "training": 8, "loop": 9, "train": 10, "serve": 10,
    "label": 11, "cli": 12, "client": 0,
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Layer names of `fdfo_engine.<layer>` imported anywhere in `path`, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        names |= {d.split(".")[1] for d in dotted if d.startswith("fdfo_engine.")}
    return names


def test_imports_point_down():
    for path in ENGINE.rglob("*.py"):
        own = path.relative_to(ENGINE).parts[0].removesuffix(".py")
        for name in imported(path) - {own, "_source_tree", "__version__"}:
            assert own.startswith("__") or LAYERS[name] < LAYERS[own], f"{path}: {own} may not import {name}"


def test_only_ops_import_kernels():
    offenders = [p for p in ENGINE.rglob("*.py") if "kernels" in imported(p) and ENGINE / "ops" not in p.parents]
    assert not offenders, offenders
    device_code = (ROOT / "kernels").rglob("*.py")
    assert not [p for p in device_code if imported(p) - {"kernels"}], "device code must not import the engine"


def test_two_files_know_deepspeed():
    """One uses it, one reads what it leaves on weights; whoever else names its attributes has to ask there."""
    knowing = {ENGINE / "update" / "zero.py", ENGINE / "runtime" / "split_weights.py"}
    marks = re.compile(r"\bds_(shape|numel|tensor|id|status)\b|(import|from) deepspeed\b")
    assert {path for path in ENGINE.rglob("*.py") if marks.search(path.read_text())} == knowing


def test_names_shadow_nothing():
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    ours = {p.name.removesuffix(".py") for p in ENGINE.iterdir()} - {"__init__", "__pycache__"}
    assert not ours & taken, ours & taken
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would hide Hugging Face kernels when run from the root"
