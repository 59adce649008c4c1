"""`fdfo bench`: how fast whole transformers sample and train here, plain and fused."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.errors import EnvironmentProblem

ARCHITECTURES = ("shapes", "blocks", "sd35-medium", "sd35-large", "flux1-dev")


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "bench",
        help="measure whole transformers on this machine, plain and fused",
        description="Measures rollout and training rate, share of the matmul rate and memory of transformers with "
        "random weights, plain diffusers (R, E), compiled (C) and fused (F) in turn, and writes a results file. Under "
        "torchrun every rank measures its own GPU and the sum is reported. Needs a checkout.",
    )
    add_options(parse)
    parse.set_defaults(verb=run)


def add_options(parse: argparse.ArgumentParser) -> None:
    """The options, which `python -m benchmarks.end_to_end` shares."""
    parse.add_argument(
        "--arch", nargs="+", choices=ARCHITECTURES, help="default: sd35-medium on a GPU, shapes and blocks on a CPU"
    )
    parse.add_argument(
        "--candidates", default="RECF", type=_letters, help="letters out of RECF; R always is; default all"
    )
    parse.add_argument("--rollout-batch", type=_positive, help="images in a forward; default by architecture")
    parse.add_argument("--train-batch", type=_positive, help="items in a micro-batch; default by architecture")
    parse.add_argument("--threads", type=_positive, help="on a CPU; default: torch's own choice")
    parse.add_argument("--seconds", type=float, default=5.0, help="about, a candidate and step; default 5")
    parse.add_argument("--out", type=Path, help="the file to write; default: under benchmarks/results")


def run(arguments: argparse.Namespace) -> int:
    """Measures; the code lies beside the package, in `benchmarks/` of a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "end_to_end.py").is_file():
        raise EnvironmentProblem(f"fdfo bench: no benchmarks/ in {root}; it needs a checkout, not an installed wheel")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    status: int = importlib.import_module("benchmarks.end_to_end").run(arguments)
    return status


def _letters(text: str) -> str:
    if not text or set(text) - set("RECF"):
        raise argparse.ArgumentTypeError(f"{text!r}: takes letters out of RECF")
    return "".join(letter for letter in "RECF" if letter in "R" + text)  # R comes first: it sets the others' bound


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: takes a whole number from 1")
    return int(text)
