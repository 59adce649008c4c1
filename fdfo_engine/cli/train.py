"""`fdfo train`: the main job, with the launcher started for you."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fdfo_engine.cli.launcher import launch, ranks_of, true_status
from fdfo_engine.cli.options import add_base, add_config, config_words

_FLAGS = ("--dry-run", "--resume", "--strict-resume", "--allow-prompt-change", "--no-tune")
"""Those of the main job, which are passed on to it."""


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "train",
        help="train; the same command again resumes",
        description="Starts fdfo_engine/train.py on one process, or under the DeepSpeed launcher on several.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parse.add_argument("-h", "--help", action=_HelpWithKeys, nargs=0, help="show this message and every setting")
    add_config(parse)
    parse.add_argument("--ranks", type=int, help="processes; default: one a GPU, one on a machine without")
    parse.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings and the arithmetic, look at prompts, rewards, model and disk; stop",
    )
    add_base(parse)
    parse.add_argument("--resume", action="store_true", help="insist that there is a checkpoint to continue from")
    parse.add_argument(
        "--strict-resume", action="store_true", help="also end if the newest checkpoint is damaged, not taking an older"
    )
    parse.add_argument(
        "--allow-prompt-change", action="store_true", help="go on with another prompt list than the run began with"
    )
    parse.add_argument("--no-tune", action="store_true", help="take ops' backends by a fixed order: kernels.tune=false")
    parse.set_defaults(verb=run)


class _HelpWithKeys(argparse.Action):
    """`--help` that lists the settings; they are read only when somebody asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fdfo_engine.config import describe_keys

        parser.epilog = "settings:\n" + describe_keys()
        parser.print_help()
        parser.exit()


def run(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit status of the run, which the launcher itself would misreport."""
    from fdfo_engine.config import load_config

    ranks = ranks_of(arguments.ranks)
    name, overrides = config_words(arguments)
    flags = [flag for flag in _FLAGS if getattr(arguments, flag[2:].replace("-", "_"))]
    moved = [] if arguments.base is None else ["--base", arguments.base]
    command = ["--config", name, *flags, *moved, *overrides]
    if ranks == 1:
        from fdfo_engine.train import main

        return main(command)
    config = load_config(name, overrides)  # a mistake is told here, before the launcher starts
    if arguments.dry_run:
        from fdfo_engine.runtime.own_code import search_in
        from fdfo_engine.train import dry_run

        search_in(Path(name).parent)
        return dry_run(config, ranks)
    started = time.time()
    script = Path(__file__).resolve().parent.parent / "train.py"
    status = launch([str(script), *command], ranks)
    return true_status(Path(config.run.dir), started, status)
