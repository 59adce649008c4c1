"""`fdfo serve`: the engine behind HTTP."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from fdfo_engine.cli.launcher import launch, ranks_of, true_status
from fdfo_engine.cli.options import add_base, add_config, config_words
from fdfo_engine.runtime.errors import EnvironmentProblem


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "serve",
        help="serve the engine over HTTP, for pages, notebooks and loops of your own",
        description="Serves one run folder: its queue, rounds, primitives, events and images (docs/BACKEND.md). "
        "The same command again goes on where it was, also after a kill. Needs pip install 'fdfo-engine[serve]'.",
    )
    add_config(parse)
    add_base(parse)
    parse.add_argument("--ranks", type=int, help="processes; default: one a GPU, one on a machine without")
    parse.add_argument("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1")
    parse.add_argument("--port", type=int, default=8710, help="default 8710; 0 takes a free one")
    parse.add_argument("--allow-remote", action="store_true", help="listen at an address that other machines reach")
    parse.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name it answers to")
    parse.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help="a page that may ask")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is stopped."""
    from fdfo_engine.config import load_config

    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(f"{' and '.join(missing)} missing: pip install 'fdfo-engine[serve]'")
    name, overrides = config_words(arguments)
    config = load_config(name, overrides)
    if arguments.base is not None:
        config = config.with_base(arguments.base)
    is_rank = "RANK" in os.environ
    ranks = 1 if is_rank else ranks_of(arguments.ranks)
    if ranks > 1:
        started = time.time()
        job = ["--no_local_rank", "--module", "fdfo_engine.cli.main", "serve", "--config", name, *overrides]
        moved = [] if arguments.base is None else ["--base", arguments.base]
        status = launch([*job, *moved, *_door_words(arguments)], ranks)
        return true_status(Path(config.run.dir), started, status)
    from fdfo_engine.runtime.own_code import search_in
    from fdfo_engine.serve.server import Door, serve

    search_in(Path(name).parent)
    door = Door(
        arguments.host, arguments.port, arguments.allow_remote, arguments.allow_host, arguments.allow_origin
    )  # fmt: skip
    serve(config, door, base_has_moved=arguments.base is not None)
    return 0


def _door_words(arguments: argparse.Namespace) -> list[str]:
    """The options about the door, as words for each rank."""
    words = ["--host", arguments.host, "--port", str(arguments.port)]
    words += ["--allow-remote"] if arguments.allow_remote else []
    for name in arguments.allow_host:
        words += ["--allow-host", name]
    for origin in arguments.allow_origin:
        words += ["--allow-origin", origin]
    return words
