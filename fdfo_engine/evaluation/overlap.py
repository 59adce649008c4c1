"""Prompts that are both trained on and evaluated with: what an evaluation says of them is no held-out result."""

from __future__ import annotations

from collections.abc import Sequence

from fdfo_engine.config import Config
from fdfo_engine.rollout.prompt_sets import PROMPT_SETS
from fdfo_engine.rollout.prompts import load_prompts
from fdfo_engine.runtime.console import visible, warn
from fdfo_engine.runtime.errors import PromptError

_SHOWN = 80


def describe_overlap(trained: Sequence[str], held_out: Sequence[str]) -> str | None:
    """How many of `held_out` are among `trained`, but for case and white space, with an example; None where none is."""
    asked = {_plain(prompt) for prompt in held_out}  # these and not the trained ones, which may be millions
    known = {plain for plain in map(_plain, trained) if plain in asked}
    common = [prompt for prompt in held_out if _plain(prompt) in known]
    if not common:
        return None
    example = visible(common[0][:_SHOWN]) + ("..." if len(common[0]) > _SHOWN else "")
    return f"{len(common)} of {len(held_out)} evaluation prompts are trained on, such as {example!r}"


def warn_of_overlap(config: Config, trained: Sequence[str], held_out: Sequence[str]) -> None:
    """Says at a run's start where its evaluations are not held out, or its training prompts are for evaluations."""
    source = config.prompts.source
    if source in PROMPT_SETS:
        warn(
            f"prompts.source = {source!r}: models are evaluated on this set; what is trained on it can't be compared "
            "there. docs/PROMPTS.md names lists to train on"
        )
    if config.evaluation.every and (overlap := describe_overlap(trained, held_out)):
        warn(f"{overlap}: evaluations are not held out; evaluation.prompts takes another list")


def warn_of_trained(config: Config, held_out: Sequence[str]) -> None:
    """Says where `held_out` are among the prompts that a run of `config` was trained on, as far as these are here."""
    try:
        trained = load_prompts(config.prompts, config.run.seed).prompts
    except PromptError as error:
        warn(f"whether the run was trained on these prompts can't be told: {error}")
        return
    if overlap := describe_overlap(trained, held_out):
        warn(f"{overlap}: what is measured on them is not held out")


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
