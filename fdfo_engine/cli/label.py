"""`fdfo label`: a person's choices as the reward, on a page."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.options import add_base, add_config, config_words
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from fdfo_engine.label.server import PageDoor


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "label",
        help="train by a person's choices between two images, on a page",
        description="Opens a page that shows pairs of images; what a person chooses is the reward (docs/LABEL.md). "
        "With --config it starts the engine, too; with --run it joins one that is being served. The same command again "
        "goes on where it was. Needs pip install 'fdfo-engine[serve]'.",
    )
    add_config(parse)
    add_base(parse)
    parse.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run that `fdfo serve` serves already")
    parse.add_argument("--ranks", type=int, help="processes of the engine, as of fdfo serve")
    parse.add_argument("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1")
    parse.add_argument("--port", type=int, default=8720, help="default 8720; 0 takes a free one")
    parse.add_argument("--allow-remote", action="store_true", help="listen at an address that other machines reach")
    parse.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name it answers to")
    parse.add_argument("--owner", default="owner", metavar="NAME", help="your name beside your answers")
    parse.add_argument("--rater", action="append", default=[], metavar="NAME", help="print a link for one more person")
    parse.add_argument(
        "--export", type=Path, metavar="FILE",
        help="write the choices of --run in Pick-a-Pic's columns, .jsonl or .parquet, and end",
    )  # fmt: skip
    parse.add_argument("--no-browser", action="store_true", help="only print the link")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves the page until it is stopped."""
    if arguments.export is not None:
        return _export(arguments)
    missing = [name for name in ("starlette", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(f"{' and '.join(missing)} missing: pip install 'fdfo-engine[serve]'")
    from fdfo_engine.label.server import PageDoor, open_page

    door = PageDoor(
        host=arguments.host, port=arguments.port, allow_remote=arguments.allow_remote, hosts=arguments.allow_host,
        owner=arguments.owner, raters=arguments.rater, opens_browser=not arguments.no_browser,
    )  # fmt: skip
    door.check()
    if arguments.run is None:
        return _with_engine(arguments, door)
    if arguments.config is not None or arguments.overrides or arguments.ranks is not None or arguments.base is not None:
        raise UsageError("--run joins a run that is being served: its settings, --ranks and --base are the server's")
    if not (arguments.run / "serve.json").is_file():
        raise UsageError(f"--run {arguments.run}: nobody serves it; fdfo serve, or fdfo label --config C")
    return open_page(arguments.run, door)


def _export(arguments: argparse.Namespace) -> int:
    from fdfo_engine.choices.pick_a_pic import export_choices
    from fdfo_engine.choices.store import read_choices
    from fdfo_engine.config import load_config
    from fdfo_engine.runtime.console import say

    if arguments.run is None:
        raise UsageError("--export: takes --run RUN_DIR, whose choices are written")
    judged = read_choices(arguments.run)
    model = load_config(str(arguments.run / "config.yaml"), []).model.id
    say(f"{export_choices(judged, model, arguments.export)} choices: {arguments.export}")
    return 0


def _with_engine(arguments: argparse.Namespace, door: PageDoor) -> int:
    from fdfo_engine.config import load_config
    from fdfo_engine.label.server import OwnEngine, open_page

    name, overrides = config_words(arguments)
    folder = Path(load_config(name, overrides).run.dir)
    command = [sys.executable, "-m", "fdfo_engine.cli.main", "serve", "--config", name, "--port", "0", *overrides]
    command += [] if arguments.ranks is None else ["--ranks", str(arguments.ranks)]
    command += [] if arguments.base is None else ["--base", arguments.base]
    with OwnEngine(command, folder) as engine:
        code = open_page(folder, door)
    return code if engine.exit_code is None else engine.exit_code
