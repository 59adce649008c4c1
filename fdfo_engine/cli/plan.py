"""`fdfo plan`: an epoch's arithmetic and its memory, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fdfo_engine.cli.options import add_config, config_words
from fdfo_engine.runtime.errors import UsageError


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "plan",
        help="an epoch's arithmetic and its memory on a GPU of a given size",
        description="Prints how an epoch is cut into blocks, optimizer steps and micro-batches, and what it takes of "
        "a GPU's memory. Counts the real architecture from its configs, on diffusers' own blocks (fused ones keep "
        "less); reads no weights and needs no GPU. Exit code 2 when it does not fit.",
    )
    add_config(parse)
    parse.add_argument(
        "--gpu-gb", type=float, default=80.0, help="memory of a GPU that is free, in the units of its name; default 80"
    )
    parse.add_argument("--ranks", type=int, default=1, help="GPUs; default 1")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    from fdfo_engine.config import BatchPlan, load_config
    from fdfo_engine.planning.fit import reward_bytes
    from fdfo_engine.planning.footprint import blank_footprint
    from fdfo_engine.planning.memory import GIB, choose_micro_batch, refusal
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.own_code import search_in
    from fdfo_engine.runtime.terminal import shown

    for name, value in (("--gpu-gb", arguments.gpu_gb), ("--ranks", arguments.ranks)):
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} {value:g}: takes more than 0")
    file, settings = config_words(arguments)
    config = load_config(file, settings)
    search_in(Path(file).parent)
    plan = BatchPlan.from_config(config, arguments.ranks)
    free = int(arguments.gpu_gb * GIB)
    with shown() as terminal, terminal.working("counting"):
        counted, scorers = blank_footprint(config), reward_bytes(config)
        prediction = choose_micro_batch(counted, config, arguments.ranks, free, scorers)
    say(dataclasses.replace(plan, micro_batch=prediction.micro_batch).describe())
    say(prediction.describe())
    if prediction.needed > free:
        raise UsageError(refusal(prediction, free))
    return 0
