"""Does a reward work here? It scores the drawn pictures, which are compared with what was recorded, where it was."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fdfo_engine.rewards.describe import weights
from fdfo_engine.rewards.drawings import CIRCLE_PROMPT, SIGN_PROMPT, pictures
from fdfo_engine.rewards.model_options import ModelReward
from fdfo_engine.rewards.registry import build, names
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.rewards.self_test import self_test
from fdfo_engine.runtime.errors import EnvironmentProblem, FdfoError, RewardError, UsageError
from fdfo_engine.runtime.failures import Failure

NONE = math.nan
"""A picture that a reward has no opinion on: the judge of the shapes takes square pictures of its own captions."""

RECORDED = {
    "brightness": (0.871242, 0.500627, 0.910938, 0.876381, 0.987681, 0.987966),
    "shapes": (1.0, 0.0, 1.0, NONE, NONE, NONE),
    "shapes_strict": (1.0, 0.0, 1.0, NONE, NONE, NONE),
    "ocr": (1.0, 1.0, 1.0, 1.0, 1.0, 0.75),
}
"""Scores of `drawings.pictures()` by rewards that need no download, with their default options."""

TOLERANCE = 1e-3

_GENEVAL = {
    CIRCLE_PROMPT: {"class": "circle", "count": 1, "color": "red"},
    "a blue square": {"class": "square", "count": 1, "color": "blue"},
    "a green triangle": {"class": "triangle", "count": 1, "color": "green"},
    SIGN_PROMPT: {"class": "sign", "count": 1},
}


@dataclass(frozen=True)
class Verdict:
    """What was found of a reward."""

    name: str
    state: Literal["ok", "absent", "skipped", "WRONG"]
    """absent: weights, a package or a server are not here, or of no use; skipped: takes options; WRONG: its scores."""

    detail: str
    scores: tuple[float, ...] = ()
    """Of the drawn pictures, in their order; NaN is no opinion."""


def verify(name: str, *, allow_download: bool = False) -> Verdict:
    """Builds a reward with its default options, and looks whether it scores, sees, and scores as recorded.

    Raises:
        UsageError: no such reward.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            reward = build(name, _needed_options(name, Path(folder)), "reward")
        except UsageError as error:
            if "required" not in str(error):
                raise
            return Verdict(name, "skipped", str(error))
        if not allow_download:
            reward.forbid_downloads()
        try:
            reward.require_ready()
            return _tried(name, reward)
        except (EnvironmentProblem, RewardError) as error:
            return Verdict(name, "absent", _way_out(name, reward, error))


def _tried(name: str, reward: Reward) -> Verdict:
    scores, failures = _scores(reward)
    trouble = f"; no opinion on {len(failures)} of {len(scores)} pictures: {failures[0]}" if failures else ""
    if len(failures) == len(scores):
        return Verdict(name, "WRONG", f"scores nothing{trouble}", scores)
    if name not in names():
        return Verdict(name, "ok", f"scores; of your own rewards nothing is recorded to compare with{trouble}", scores)
    try:
        self_test(reward)
    except RewardError as error:
        return Verdict(name, "WRONG", f"{error}{trouble}", scores)
    if name not in RECORDED:
        return Verdict(name, "ok", f"passes its self-test; no scores are recorded to compare with{trouble}", scores)
    if not all(map(_equal, scores, RECORDED[name])):
        return Verdict(name, "WRONG", f"recorded are {shown(RECORDED[name])}{trouble}", scores)
    return Verdict(name, "ok", "passes its self-test; scores are as recorded", scores)


def _scores(reward: Reward) -> tuple[tuple[float, ...], list[Failure]]:
    """Of the drawn pictures, one at a time; where it raises, NaN and what it raised."""
    scores, failures = [], []
    for picture in pictures():
        try:
            with torch.no_grad():
                scores.append(float(torch.as_tensor(reward([picture.prompt], picture.image[None]))[0]))
        except FdfoError:
            raise
        except Exception as error:  # noqa: BLE001 - a reward is anybody's code; its failure is told
            scores.append(math.nan)
            failures.append(Failure.of(error))
    return tuple(scores), failures


def _equal(score: float, recorded: float) -> bool:
    return (math.isnan(score) and math.isnan(recorded)) or abs(score - recorded) <= TOLERANCE * max(1.0, abs(recorded))


def shown(scores: Sequence[float]) -> str:
    """Scores for a person; a dash is no opinion."""
    return "  ".join(f"{'-' if math.isnan(score) else f'{score:.4g}':>7}" for score in scores)


def _needed_options(name: str, folder: Path) -> dict[str, Any]:
    """`geneval` takes a file of requirements: that of the drawn pictures."""
    if name != "geneval":
        return {}
    file = folder / "metadata.jsonl"
    lines = [json.dumps({"prompt": prompt, "include": [wanted]}) for prompt, wanted in _GENEVAL.items()]
    file.write_text("\n".join(lines))
    return {"metadata": str(file)}


def _way_out(name: str, reward: Reward, error: Exception) -> str:
    """What is missing; of weights also their sizes, and how to get them."""
    missing = list(weights(reward.options, only_missing=True)) if isinstance(reward, ModelReward) else []
    if not missing:
        return str(error)
    return "\n".join(["not on this machine:", *missing, f"fetch it: fdfo rewards verify {name} --allow-download"])
