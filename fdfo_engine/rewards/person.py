"""A person's choices as a reward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from fdfo_engine.choices.records import standing
from fdfo_engine.choices.store import read_choices
from fdfo_engine.config.section import Name, Section
from fdfo_engine.rewards.registry import register
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.runtime.errors import RewardError

PERSON = "person"
Pixels = NDArray[np.float32]


class PersonOptions(Section):
    """Whose choices."""

    replay: Name | None = None
    """Run folder whose choices are given again; null asks at the page of `fdfo label`."""

    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Of a replay: root mean square difference of the pixels, in 0..1, up to which an image is the one judged."""


@register(PERSON)
class Person(Reward):
    """What a person prefers: 1 for the image that was chosen, 0 for the other one, 1/2 each for a tie, else NaN.

    While `fdfo label` runs, the choices of a round are this reward, and the run's other rewards of the same images are
    added with their weights. With `replay` it gives the choices of an earlier run to the images that were judged
    there, whatever run draws them again (the same pairs of the same weights are the same images); others have no
    opinion. Of several raters the mean. Loads no model; reads the files of the earlier run.
    """

    Options: type[PersonOptions] = PersonOptions

    def __init__(self, options: PersonOptions) -> None:
        self.options = options

    def require_ready(self) -> None:
        """Asks for a page, or for a folder with choices."""
        if self.options.replay is None:
            raise RewardError(
                f"{PERSON}: is asked at a page: fdfo label --config C; or replay: RUN_DIR takes an earlier run's"
            )
        if not self._judged:
            raise RewardError(f"{PERSON}: {self.options.replay} holds no choices")

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """The rewards of images that were judged; NaN for all others."""
        if self.options.replay is None:
            return torch.full((len(images),), torch.nan)
        pixels = images.float().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self._score(prompt, image) for prompt, image in zip(prompts, pixels, strict=True)])

    def _score(self, prompt: str, image: Pixels) -> float:
        for judged, reward in self._judged.get(prompt, []):
            is_same_size = judged.shape == image.shape
            if is_same_size and float(np.sqrt(np.mean((judged - image) ** 2))) <= self.options.tolerance:
                return reward
        return float("nan")

    @functools.cached_property
    def _judged(self) -> dict[str, list[tuple[Pixels, float]]]:
        """Images with their mean reward, by prompt."""
        folder = Path(str(self.options.replay))
        by_event = {each.choice.event: each for each in read_choices(folder) if not each.choice.is_comparison}
        rewards: dict[tuple[str, Path], list[float]] = {}
        for choice in standing(each.choice for each in by_event.values()):
            judged = by_event[choice.event]
            for path, reward in zip(judged.images, choice.rewards, strict=True):
                if reward is not None:
                    rewards.setdefault((judged.prompt, path), []).append(reward)
        found: dict[str, list[tuple[Pixels, float]]] = {}
        for (prompt, path), given in rewards.items():
            found.setdefault(prompt, []).append((_pixels(path), sum(given) / len(given)))
        return found


def _pixels(path: Path) -> Pixels:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255)
    except OSError as error:
        raise RewardError(f"{PERSON}: {path}: cannot be read: {error}") from error
