"""`fdfo config`: the configs that come with the package, listed and printed."""

from __future__ import annotations

import argparse
from typing import Any

from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import UsageError


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "config",
        help="list the configs that come with the package, print one",
        description="Lists the configs that come with the package, and further files: for clusters, and examples. "
        "`show NAME` prints one, `fdfo config show sd35m_16gb > my.yaml` keeps it; `fdfo new` copies one to edit.",
        usage="fdfo config [list | [show] NAME]",
    )
    parse.add_argument("overrides", nargs="*", metavar="WORD", help="list, or show and the NAME of a config or file")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Lists, or prints the file that is named."""
    from fdfo_engine.config.shipped import shipped_file

    first, *rest = arguments.overrides or ["list"]
    if first == "list" and not rest:
        return _list()
    names = rest if first == "show" else [first, *rest]
    if len(names) != 1:
        raise UsageError(f"{' '.join(arguments.overrides)}: takes list, or show NAME")
    say(shipped_file(names[0]).read_text(encoding="utf-8").rstrip("\n"))
    return 0


def _list() -> int:
    from fdfo_engine.config.load import bundled_configs
    from fdfo_engine.config.shipped import first_comment, further_files

    for name, file in bundled_configs().items():
        say(f"{name:17} {first_comment(file)}")
    say("\nfiles beside them: " + ", ".join(further_files()))
    say("`fdfo config show NAME` prints one; `fdfo new FOLDER --from NAME` makes a folder to edit")
    return 0
