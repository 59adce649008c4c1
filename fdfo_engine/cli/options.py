"""Options that several verbs have: how they are added to a parser, and what they mean once given."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.runtime.durable import refuse_filled
from fdfo_engine.runtime.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from fdfo_engine.config import Config

SHAPES_COUNT = 16
"""Prompts that `--prompts shapes` stands for, unless `--count` says otherwise."""


def add_config(parse: argparse.ArgumentParser) -> None:
    """The config of a run, by position or as `--config`, and settings that replace its own; see `config_words`."""
    parse.add_argument("--config", help="YAML file, or the bare name of a bundled one (shapes); also by position")
    parse.add_argument(
        "overrides", nargs="*", metavar="CONFIG | section.key=value", help="the config; a setting to replace in it"
    )


def config_words(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The config's file or name, and the settings that were given with it.

    Raises:
        UsageError: no config, or several.
    """
    names = [word for word in arguments.overrides if "=" not in word]
    given = names if arguments.config is None else [arguments.config, *names]
    if not given:
        raise UsageError("no config: takes a YAML file, or the bare name of a bundled one (shapes)")
    if len(given) > 1:
        raise UsageError(f"{', '.join(given)}: takes one config; a setting is given as section.key=value")
    return given[0], [word for word in arguments.overrides if "=" in word]


def config_of(arguments: argparse.Namespace) -> Config:
    """The config that was given; code of one's own is looked for beside it, too.

    Raises:
        UsageError, ConfigError: as `config_words` and `load_config`.
    """
    from fdfo_engine.config import load_config
    from fdfo_engine.runtime.own_code import search_in

    file, settings = config_words(arguments)
    config = load_config(file, settings)
    search_in(Path(file).parent)
    return config


def add_run_dir(parse: argparse.ArgumentParser) -> None:
    """A run folder, by position."""
    parse.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run folder")


def add_base(parse: argparse.ArgumentParser) -> None:
    """`--base`: the base model of a run, at another place."""
    parse.add_argument("--base", metavar="PATH", help="where the base model lies now, if it moved since the run began")


def add_checkpoints(parse: argparse.ArgumentParser, further: str = "") -> None:
    """`--checkpoint`, which may be repeated."""
    parse.add_argument(
        "--checkpoint", action="append", default=[], metavar="NAME",
        help=f"such as epoch_000010, or `all`; may be repeated{further}; default: the newest",
    )  # fmt: skip


def chosen_checkpoints(run_dir: Path | str, wanted: list[str]) -> list[str]:
    """Names of the checkpoints that `--checkpoint` asks for, as ordered there; empty where it was not given.

    Raises:
        CheckpointError: the run has none, or not one of these.
    """
    from fdfo_engine.runtime.run_folder import checkpoint_store

    found = checkpoint_store(run_dir).names()
    if not found:
        raise CheckpointError(f"{run_dir}: no checkpoint there; --untrained takes the untrained model")
    if missing := set(wanted) - {*found, "all"}:
        raise CheckpointError(f"{run_dir}: no checkpoint {', '.join(sorted(missing))}; found: {', '.join(found)}")
    return found if "all" in wanted else list(dict.fromkeys(wanted))


def add_prompt_files(parse: argparse.ArgumentParser, *, required: bool) -> Any:
    """`--prompts` with its options; returns the exclusive group, to which a verb may add."""
    group = parse.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--prompts", metavar="FILE|SET",
        help="text, .jsonl, .json, .csv, .tsv or .parquet file; starter, drawbench, parti, hpdv2, pickscore or "
        "hub:OWNER/NAME/FILE; or `shapes`: its held-out captions",
    )  # fmt: skip
    parse.add_argument("--column", help="column of the prompt in a file that has several; default: the run's")
    parse.add_argument("--allow-download", action="store_true", help="let a prompt set or a metric's model be fetched")
    return group


def load_prompt_list(arguments: argparse.Namespace, config: Config) -> list[str]:
    """The prompts of `--prompts`, the first `--count` of them; says how many there are and what was left out."""
    from fdfo_engine.rollout.prompts import describe_prompts, load_prompts
    from fdfo_engine.runtime.console import say

    count = arguments.count or (SHAPES_COUNT if arguments.prompts == "shapes" else None)
    changes: dict[str, Any] = {"source": arguments.prompts, "allow_download": arguments.allow_download}
    changes |= {"count": count} if count else {}
    changes |= {"column": arguments.column} if arguments.column else {}
    settings = config.prompts.model_copy(update=changes)
    prompts = load_prompts(settings, config.evaluation.seed, split="heldout")
    say(describe_prompts(prompts))
    return prompts.prompts[:count]


def add_weights(parse: argparse.ArgumentParser) -> None:
    """`--ema` or `--raw`; without either the average is taken where the run keeps one."""
    group = parse.add_mutually_exclusive_group()
    group.add_argument("--ema", dest="weights", action="store_const", const="ema", help="the averaged weights")
    group.add_argument("--raw", dest="weights", action="store_const", const="raw", help="the last step's weights")
    parse.set_defaults(weights="auto")


def refuse_absent_average(arguments: argparse.Namespace, config: Config) -> None:
    """`--ema` is for runs that keep an average."""
    if arguments.weights == "ema" and config.update.ema is None:
        raise UsageError("--ema: the run keeps no average of its weights (update.ema is not set)")


def add_overwrite(parse: argparse.ArgumentParser) -> None:
    """`--overwrite`; see `refuse_filled_out`."""
    parse.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")


def refuse_filled_out(folder: Path, arguments: argparse.Namespace) -> None:
    """A folder that holds something is only written to with `--overwrite`."""
    refuse_filled(folder, arguments.overwrite, "--overwrite")


def refuse_outside(arguments: argparse.Namespace, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Options that were given take numbers from a least to a largest, by the option's name in Python."""
    for name, (least, most) in bounds.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name.replace('_', '-')} {value}: takes a number from {least} to {most}")
