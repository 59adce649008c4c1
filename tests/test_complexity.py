"""Functions stay simple and files short. Decisions of comprehensions are counted too, which ruff's C901 leaves out: a
function that was packed into comprehensions counts like one that was written as loops.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_DECISIONS, MOST_LINES, MOST_KERNEL_LINES, LONGEST_FILE = 12, 80, 100, 400
ONE_EACH = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)

ONE_FILE_TO_COPY = {"fdfo_engine/client.py"}


def product():
    """Files whose functions are measured."""
    return [
        ROOT / "setup.py",
        *(path for folder in ("fdfo_engine", "kernels") for path in (ROOT / folder).rglob("*.py")),
    ]


def functions(path):
    """Of modules and classes; what is defined inside a function belongs to it."""
    inside = [ast.parse(path.read_text())]
    for scope in inside:
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                inside.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def complexity(function):
    """Ways through it: one, and one more for each decision."""
    found = 1
    for node in ast.walk(function):
        if isinstance(node, ONE_EACH):
            found += 1
        elif isinstance(node, ast.comprehension):
            found += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            found += len(node.values) - 1
    return found


@pytest.mark.parametrize(
    ("code", "ways"),
    [
        ("return 1", 1),
        ("if a and b or c:\n  return 1\nelif d:\n  return 2\nelse:\n  return 3", 5),
        ("return [x for x in y if x if not x]", 4),
        ("return {x: [z for z in x] for x in y}", 3),
        ("for a in b:\n  while a:\n    a = 1 if a else 2", 4),
        ("try:\n  pass\nexcept A:\n  pass\nexcept B:\n  pass", 3),
        ("match a:\n  case 1:\n    pass\n  case _:\n    pass", 3),
        ("def inner():\n  assert a\nreturn lambda: b or c", 3),
    ],
)
def test_counts_decisions(code, ways):
    body = "".join(f"  {line}\n" for line in code.splitlines())
    (function,) = ast.parse(f"def f(a):\n{body}").body
    assert complexity(function) == ways


def test_functions_are_simple():
    found = {}
    for path in product():
        name = str(path.relative_to(ROOT))
        ways = {f"{name}::{f.name}": complexity(f) for f in functions(path)}
        found |= {function: count for function, count in ways.items() if count > MOST_DECISIONS}
    assert not found, f"more than {MOST_DECISIONS} ways through a function"


def test_functions_fit_a_screen():
    found = []
    for path in product():
        most = MOST_KERNEL_LINES if "kernels" in path.parts else MOST_LINES
        lines = {f"{path.name}::{f.name}": f.end_lineno - f.lineno + 1 for f in functions(path)}
        found += [(name, count) for name, count in lines.items() if count > most]
    assert not found, found


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in product()}
    long = {name for name, count in lines.items() if count > LONGEST_FILE}
    assert not long - ONE_FILE_TO_COPY


def test_no_name_is_bound_in_the_filter_of_a_comprehension():
    found = set()
    for path in product():
        comprehensions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.comprehension)]
        filters = [condition for node in comprehensions for condition in node.ifs]
        inside = [node for condition in filters for node in ast.walk(condition)]
        if any(isinstance(node, ast.NamedExpr) for node in inside):
            found.add(str(path.relative_to(ROOT)))
    assert not found
