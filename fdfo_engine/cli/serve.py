"""`fdfo serve`: the engine behind HTTP."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from fdfo_engine.runtime.errors import EnvironmentProblem


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "serve",
        help="serve the engine over HTTP, for pages, notebooks and loops of your own",
        description="Serves one run folder: its queue, rounds, primitives, events and images (docs/BACKEND.md). "
        "The same command again goes on where it was, also after a kill. Needs pip install 'fdfo-engine[serve]'.",
    )
    parse.add_argument("--config", required=True, help="YAML file, or the bare name of a bundled one (shapes)")
    parse.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a setting of the file")
    parse.add_argument("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1")
    parse.add_argument("--port", type=int, default=8710, help="default 8710; 0 takes a free one")
    parse.add_argument("--allow-remote", action="store_true", help="listen at an address that other machines reach")
    parse.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name it answers to")
    parse.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help="a page that may ask")
    parse.add_argument("--local_rank", help=argparse.SUPPRESS)  # a launcher passes it; the environment wins
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    from fdfo_engine.config import load_config

    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(f"{' and '.join(missing)} missing: pip install 'fdfo-engine[serve]'")
    config = load_config(arguments.config, arguments.overrides)
    from fdfo_engine.serve.server import Door, serve

    door = Door(
        arguments.host, arguments.port, arguments.allow_remote, arguments.allow_host, arguments.allow_origin
    )  # fmt: skip
    serve(config, door)
    return 0
