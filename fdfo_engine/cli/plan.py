"""`fdfo plan`: an epoch's arithmetic and its memory, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.options import add_config, config_of
from fdfo_engine.runtime.errors import UsageError

if TYPE_CHECKING:
    from fdfo_engine.config import BatchPlan, Config
    from fdfo_engine.planning.footprint import Footprint
    from fdfo_engine.planning.memory import Prediction


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "plan",
        help="an epoch's arithmetic and its memory on a GPU of a given size",
        description="Prints whether a run fits, its disk and its hours; how an epoch is cut into blocks, optimizer "
        "steps and micro-batches; and what it takes of a GPU's memory. Counts the real architecture from its configs, "
        "on diffusers' own blocks (fused ones keep less); reads no weights and needs no GPU. Exit code 2 when it does "
        "not fit.",
    )
    add_config(parse)
    parse.add_argument(
        "--gpu-gb", type=float, default=80.0, help="memory of a GPU that is free, in the units of its name; default 80"
    )
    parse.add_argument("--ranks", type=int, default=1, help="GPUs; default 1")
    parse.add_argument(
        "--passes-per-second", type=float, metavar="N",
        help="of the network, over all GPUs: tells the hours; default: what run.dir has measured, if it has",
    )  # fmt: skip
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    from fdfo_engine.config import BatchPlan
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.terminal import importing, shown

    given = {
        "--gpu-gb": arguments.gpu_gb,
        "--ranks": arguments.ranks,
        "--passes-per-second": arguments.passes_per_second,
    }
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} {value:g}: takes more than 0")
    config = config_of(arguments)
    plan = BatchPlan.from_config(config, arguments.ranks)
    with importing():
        from fdfo_engine.planning.fit import reward_bytes
        from fdfo_engine.planning.footprint import blank_footprint
        from fdfo_engine.planning.memory import GIB, choose_micro_batch, refusal
    free = int(arguments.gpu_gb * GIB)
    with shown() as terminal, terminal.working("counting"):
        counted, scorers = blank_footprint(config), reward_bytes(config)
        prediction = choose_micro_batch(counted, config, arguments.ranks, free, scorers)
    say(_verdict(arguments, config, plan, prediction, counted))
    say(dataclasses.replace(plan, micro_batch=prediction.micro_batch).describe())
    say(prediction.describe())
    if prediction.needed > free:
        raise UsageError(refusal(prediction, free))
    return 0


def _verdict(
    arguments: argparse.Namespace, config: Config, plan: BatchPlan, prediction: Prediction, counted: Footprint
) -> str:
    """What a person wants to know first: whether it fits, disk and time."""
    from fdfo_engine.config.batch import counted as in_words
    from fdfo_engine.planning.memory import GIB, checkpoints_bytes, in_gib

    fits = "fits" if prediction.needed <= int(arguments.gpu_gb * GIB) else "does not fit"
    disk = checkpoints_bytes(counted.trained_values, config) / 1e9
    return (
        f"{fits}: {in_gib(prediction.needed)} of {arguments.gpu_gb:g} GiB on {in_words(arguments.ranks, 'GPU')}; "
        f"{disk:.1f} GB of disk for checkpoints; {_time(arguments.passes_per_second, config, plan)}"
    )


def _time(passes_per_second: float | None, config: Config, plan: BatchPlan) -> str:
    """Hours of the whole run, at a given pace or at that of the epochs that `run.dir` holds."""
    from fdfo_engine.runtime.run_folder import METRICS_NAME, read_log

    epochs = config.run.epochs
    if passes_per_second is not None:
        hours = epochs * plan.evaluations_per_epoch / passes_per_second / 3600
        return f"{hours:.1f} hours for {epochs} epochs at {passes_per_second:g} passes a second"
    lines = read_log(Path(config.run.dir) / METRICS_NAME)
    measured = [line["seconds_total"] for line in lines if isinstance(line.get("seconds_total"), int | float)]
    if measured:
        hours = epochs * statistics.median(measured) / 3600
        return f"{hours:.1f} hours for {epochs} epochs at the pace of the {len(measured)} in {config.run.dir}"
    return f"hours: after an epoch the run knows its pace; --passes-per-second tells it before ({epochs} epochs)"
