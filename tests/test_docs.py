"""What the documentation points at is there, and what it tells to type is a command."""

import re
import shlex
from pathlib import Path

import pytest

from fdfo_engine.cli.main import parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def commands(page):
    """Lines of the page's code blocks that begin with `fdfo `, without their comments."""
    for block in re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("fdfo "):
                yield line.split(" #")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    for command in commands(page):
        words = [word for word in shlex.split(command)[1:] if word != "..."]
        arguments, rest = parser().parse_known_args(words)
        assert not [word for word in rest if word.startswith("-")], command
        assert hasattr(arguments, "verb"), command


def test_every_verb_is_told_of():
    text = "".join(page.read_text() for page in PAGES)
    verbs = next(action for action in parser()._actions if action.dest == "verb_name").choices
    assert [verb for verb in verbs if f"fdfo {verb}" not in text] == []


def test_every_promise_has_its_test():
    rows = [line for line in (ROOT / "docs/RELIABILITY.md").read_text().splitlines() if line.startswith("| ")][1:]
    promises = [row for row in rows if not row.startswith("| **")]
    assert len(promises) > 30
    for row in promises:
        (named,) = re.findall(r"`(tests/\S+\.py)(?:::(\w+))?` \|$", row)
        file, function = named
        source = (ROOT / file).read_text()
        assert not function or f"\ndef {function}(" in source, row
