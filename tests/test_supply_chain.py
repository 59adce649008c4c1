"""No line of ours runs what came from outside: unpickles, evaluates, starts a shell, or takes code with a model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for place in ("fdfo_engine", "kernels", "benchmarks") for path in sorted((ROOT / place).rglob("*.py"))]
FILES.append(ROOT / "setup.py")

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.unsafe_load",
    "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "torch.hub.load", "runpy.run_path",
}  # fmt: skip
NEEDED = {"torch.load": ("weights_only", True)}
"""By call: the keyword, and its value, without which it is not allowed."""
FORBIDDEN_KEYWORDS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "CoreLoader", "BaseLoader"}


def dotted(node):
    """`os.system` of the expression that names it, `load` of `from torch import load` included by its last part."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree):
    """What each local name stands for: `{"t": "torch", "load": "torch.load"}`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.asname and alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: full for name, full in names.items() if full}


def modules_of(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def faults_of_call(call, names):
    first, dot, rest = dotted(call.func).partition(".")
    name = names.get(first, first) + dot + rest
    keywords = {key.arg: key.value.value for key in call.keywords if isinstance(key.value, ast.Constant)}
    faults = [f"{key}={value}" for key, value in keywords.items() if (key, value) in FORBIDDEN_KEYWORDS]
    if name in FORBIDDEN_CALLS:
        faults.append(name)
    if name in NEEDED and keywords.get(NEEDED[name][0]) != NEEDED[name][1]:
        faults.append(f"{name} without {NEEDED[name][0]}")
    if name in ("yaml.load", "yaml.load_all"):
        loaders = [*call.args[1:], *(key.value for key in call.keywords if key.arg == "Loader")]
        safe = loaders and all(dotted(loader).rpartition(".")[2] in SAFE_LOADERS for loader in loaders)
        faults += [] if safe else [f"{name} without a safe loader"]
    if name in ("__import__", "importlib.import_module", "import_module"):
        given = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
        faults += [f"{name} of {given}"] if str(given).partition(".")[0] in FORBIDDEN_MODULES else []
    return faults


def faults_in(source):
    """Every forbidden import, call and keyword of a source, with its line."""
    tree, faults = ast.parse(source), []
    names = imported(tree)
    for node in ast.walk(tree):
        found = [name for name in modules_of(node) if set(name.split(".")) & FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            found += faults_of_call(node, names)
        faults += [f"{node.lineno}: {fault}" for fault in found]
    return faults


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_of_ours_runs_what_came_from_outside(path):
    assert faults_in(path.read_text()) == []


PLANTED = [
    "import pickle", "import a, dill as d", "from joblib import load", "def f():\n    from pickle import loads",
    "import six.moves.cPickle", "importlib.import_module('pickle')", "__import__('dill')",
    "eval('1')", "exec(text)", "import os\nos.system('x')", "from os import system\nsystem('x')",
    "import os as o\no.popen('x')",
    "subprocess.run('x', shell=True)", "subprocess.Popen(['x'], shell=True)",
    "import torch\ntorch.load(f)", "torch.load(f, weights_only=False)", "from torch import load as l\nl(f)",
    "import torch as t\nt.load(f, map_location='cpu')", "torch.load(f, weights_only=flag)",
    "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)", "yaml.load(t, yaml.UnsafeLoader)", "yaml.full_load(t)",
    "from yaml import load\nload(t, Loader=Loader)", "AutoModel.from_pretrained(n, trust_remote_code=True)",
    "np.load(f, allow_pickle=True)", "torch.hub.load('a/b', 'c')",
]  # fmt: skip
HARMLESS = [
    "import torch\ntorch.load(f, weights_only=True)", "yaml.load(t, Loader=yaml.SafeLoader)",
    "yaml.load(t, CoreLoader)",
    "yaml.safe_load(t)", "model.eval()", "subprocess.run(['x'])", "re.compile(t)", "re.exec", "json.load(f)",
    "f(trust_remote_code=False)", "'import pickle'", "# eval(x)", "importlib.import_module('deepspeed')",
]  # fmt: skip


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_fault_is_found(source):
    assert faults_in(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_harmless_is_left(source):
    assert faults_in(source) == []
