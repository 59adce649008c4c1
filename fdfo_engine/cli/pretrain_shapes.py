"""`fdfo pretrain-shapes`: makes the bundled miniature's base model again, from nothing."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.options import add_overwrite, refuse_filled_out, refuse_outside
from fdfo_engine.runtime.durable import open_to_readers
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from fdfo_engine.shapes.pretrain import Reporting


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "pretrain-shapes",
        help="make the bundled miniature's base model again",
        description="Trains the shapes autoencoder and flow model from nothing, about 50 minutes on two cores, and "
        "writes a diffusers pipeline folder with its log. Equal arguments give equal weights.",
    )
    parse.add_argument("out", type=Path, help="the pipeline folder to write; an existing one is replaced at the end")
    parse.add_argument("--seed", type=int, default=0, help="default 0")
    parse.add_argument("--steps", type=int, help="steps of the flow stage; default: those of the shipped base")
    parse.add_argument("--autoencoder-steps", type=int, help="steps of the first stage; default likewise")
    parse.add_argument("--continue-from", type=Path, metavar="FOLDER", help="train this base further instead")
    parse.add_argument("--threads", type=int, default=2, help="part of what makes weights equal; default 2")
    add_overwrite(parse)
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Pretrains; prints each line of its log."""
    refuse_filled_out(arguments.out, arguments)
    bounds = {"steps": (1, 10**9), "autoencoder_steps": (1, 10**9), "threads": (1, 1024), "seed": (0, 2**63 - 1)}
    refuse_outside(arguments, bounds)
    if arguments.continue_from is not None and not (arguments.continue_from / "model_index.json").is_file():
        raise EnvironmentProblem(f"--continue-from {arguments.continue_from}: no diffusers pipeline folder")
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.continue_from is None:
        _from_nothing(arguments)
    else:
        _further(arguments)
    open_to_readers(arguments.out)
    return 0


def _from_nothing(arguments: argparse.Namespace) -> None:
    from fdfo_engine.shapes.pretrain import PretrainSettings, pretrain

    settings = PretrainSettings()
    flow, autoencoder = settings.flow, settings.autoencoder
    if arguments.steps is not None:
        flow = dataclasses.replace(flow, steps=arguments.steps)
    if arguments.autoencoder_steps is not None:
        autoencoder = dataclasses.replace(autoencoder, steps=arguments.autoencoder_steps)
    settings = PretrainSettings(autoencoder=autoencoder, flow=flow)
    with _reported() as reporting:
        pretrain(arguments.out, seed=arguments.seed, settings=settings, reporting=reporting)


def _further(arguments: argparse.Namespace) -> None:
    from fdfo_engine.shapes.pretrain import continue_pretraining

    if arguments.steps is None:
        raise UsageError("--continue-from: takes --steps, how many more")
    with _reported() as reporting:
        continue_pretraining(
            arguments.continue_from, arguments.out, steps=arguments.steps, seed=arguments.seed, reporting=reporting
        )


@contextmanager
def _reported() -> Iterator[Reporting]:
    """Each line of the log is printed, each step moves a bar."""
    from fdfo_engine.runtime import events
    from fdfo_engine.runtime.terminal import shown
    from fdfo_engine.shapes.pretrain import Reporting

    with shown() as terminal:
        stream = events.EventStream([terminal])

        def step(stage: str, done: int, total: int) -> None:
            stream.tell(events.Phase(epoch=0, name="pretraining", done=done, total=total, unit=f"{stage} steps"))

        yield Reporting(progress=_say_line, step=step)


def _say_line(line: dict[str, Any]) -> None:
    import json

    from fdfo_engine.runtime.console import say

    say(json.dumps(line))
