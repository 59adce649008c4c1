"""The main job: `deepspeed fdfo_engine/train.py --config configs/shapes.yaml`, or `python`, or `torchrun`."""

import argparse
import os
import sys
from pathlib import Path

# A file launch puts this folder first on sys.path; our module names must not hide anyone else's.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _HERE]
if str(_HERE.parent) not in sys.path:
    sys.path.append(str(_HERE.parent))  # lets an uninstalled checkout run

from fdfo_engine.runtime.starting import ended_by_signals, starters

starters()  # remembered before anything heavy is imported: a launcher that dies meanwhile is noticed

from fdfo_engine.config import BatchPlan, Config, describe_keys, dump_config, load_config
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import report_and_exit_code
from fdfo_engine.runtime.process import claim_process, end_process


def parser() -> argparse.ArgumentParser:
    """The command line; every setting can follow as `section.key=value`."""
    parse = argparse.ArgumentParser(
        prog="train.py",
        description="Post-trains a flow model by paired trajectories (FDFO). The same command again resumes the run.",
        epilog="settings:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--config", required=True, help="YAML file, or the bare name of a bundled one (shapes)")
    parse.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a setting of the file")
    parse.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings and the arithmetic, look at prompts, rewards, model and disk; stop",
    )
    parse.add_argument("--resume", action="store_true", help="insist that there is a checkpoint to continue from")
    parse.add_argument(
        "--strict-resume", action="store_true", help="also end if the newest checkpoint is damaged, not taking an older"
    )
    parse.add_argument(
        "--allow-prompt-change", action="store_true", help="go on with another prompt list than the run began with"
    )
    parse.add_argument("--no-tune", action="store_true", help="take ops' backends by a fixed order: kernels.tune=false")
    parse.add_argument("--base", metavar="PATH", help="where the base model lies now, if it moved since the run began")
    parse.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it; the environment wins
    return parse


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (see `fdfo_engine.runtime.errors`)."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        with ended_by_signals():
            return _run(arguments)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the top: reported with its exit status
        return report_and_exit_code(error)
    finally:
        _leave_group()


def _run(arguments: argparse.Namespace) -> int:
    untuned = ["kernels.tune=false"] if arguments.no_tune else []
    config = load_config(arguments.config, arguments.overrides + untuned)
    if arguments.base is not None:
        config = config.with_base(arguments.base)
    from fdfo_engine.runtime.own_code import search_in

    search_in(Path(arguments.config).parent)
    if arguments.dry_run:
        return dry_run(config, _launched_ranks())
    from fdfo_engine.runtime.terminal import importing

    with importing():
        from fdfo_engine.loop import run

    run(
        config, resume=arguments.resume, base_has_moved=arguments.base is not None,
        strict_resume=arguments.strict_resume, allow_prompt_change=arguments.allow_prompt_change,
    )  # fmt: skip
    return 0


def dry_run(config: Config, ranks: int) -> int:
    """Prints the settings, the arithmetic and what is found of prompts, rewards, model and disk; no weight is loaded.

    Returns the exit status: of the first thing that would stop the run, else 0.
    """
    say(dump_config(config) + "\n" + BatchPlan.from_config(config, ranks).describe())
    from fdfo_engine.runtime.terminal import importing

    with importing():
        from fdfo_engine.training.preflight import look_at

    return look_at(config)


def _launched_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _leave_group() -> None:
    if "torch" in sys.modules:
        from fdfo_engine.runtime.distributed import close_distributed

        close_distributed()


if __name__ == "__main__":
    claim_process()
    end_process(main())
