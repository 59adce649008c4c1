"""`fdfo`: the verbs beside the main job `train.py`. Heavy libraries load only once a verb runs."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from fdfo_engine import __version__
from fdfo_engine.cli import (
    bench,
    config,
    doctor,
    evaluate,
    export,
    generate,
    label,
    new,
    plan,
    pretrain_shapes,
    report,
    rewards,
    schema,
    serve,
    status,
    train,
    tune,
)
from fdfo_engine.runtime.errors import UsageError, report_and_exit_code
from fdfo_engine.runtime.process import claim_process, end_process

Verb = Callable[[argparse.Namespace], int]
_VERBS = (
    config,
    new,
    train,
    generate,
    evaluate,
    report,
    export,
    status,
    doctor,
    plan,
    rewards,
    bench,
    tune,
    schema,
    serve,
    label,
    pretrain_shapes,
)


def parser() -> argparse.ArgumentParser:
    """The command line; each verb's parser carries the function to run as `verb`."""
    parse = argparse.ArgumentParser(
        prog="fdfo",
        description="Post-trains text-to-image flow models by paired trajectories (FDFO).",
        epilog="`fdfo VERB --help` shows a verb's options. Exit codes: 0 done, 2 usage, 3 environment, 4 prompts, "
        "5 reward, 6 numerics, 7 checkpoint or storage, 8 distributed, 75 stopped and resumable, 1 a bug.",
    )
    parse.add_argument("--version", action="version", version=f"fdfo-engine {__version__}")
    verbs = parse.add_subparsers(dest="verb_name", metavar="VERB")
    for module in _VERBS:
        module.add_parser(verbs)
    for verb in verbs.choices.values():
        verb.set_defaults(verb_parser=verb)
    return parse


def command() -> NoReturn:
    """The `fdfo` command: `main` for a process of its own."""
    claim_process()
    end_process(main())


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (see `fdfo_engine.runtime.errors`)."""
    parse = parser()
    arguments = _parsed(parse, argv)
    if arguments.verb_name is None:
        parse.print_help()
        return UsageError.exit_code
    verb: Verb = arguments.verb
    code = 0
    try:
        code = verb(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the top: reported with its exit status
        return report_and_exit_code(error)
    finally:
        if os.environ.get("WORLD_SIZE", "1") != "1" and "torch" in sys.modules:
            from fdfo_engine.runtime.distributed import close_distributed

            close_distributed()


def _parsed(parse: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments; settings may stand before and after options, which argparse alone does not allow in a verb."""
    arguments, rest = parse.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        used = getattr(arguments, "verb_parser", parse)
        used.error(f"unrecognized arguments: {' '.join(rest)}{_nearest_option(used, rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _nearest_option(parse: argparse.ArgumentParser, words: list[str]) -> str:
    """`; did you mean --dry-run?` where one of `words` is nearly an option of `parse`."""
    options = re.findall(r"--([a-z][a-z-]*)", parse.format_usage())
    for word in words:
        near = difflib.get_close_matches(word.lstrip("-").split("=")[0], options, n=1)
        if near:
            return f"; did you mean --{near[0]}?"
    return ""


if __name__ == "__main__":
    command()
