"""The weighted list of a config as one reward, with every part logged by itself."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fdfo_engine.config import RewardConfig
from fdfo_engine.rewards.registry import Reward, build
from fdfo_engine.runtime.errors import FdfoError, RewardError


@dataclass(frozen=True)
class Scores:
    """`total` float32 `[N]`, the weighted sum, NaN where any part had no opinion; `parts` by name, unweighted."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass
class WeightedRewards:
    """Scores images by several rewards. A part that fails twice has no opinion (NaN) on that batch: never a number."""

    rewards: dict[str, tuple[float, Reward]]
    log_folder: Path | None = None

    @classmethod
    def from_config(cls, settings: Sequence[RewardConfig], log_folder: Path | None = None) -> WeightedRewards:
        """Builds every reward of the list; two of one name are told apart by their position."""
        rewards: dict[str, tuple[float, Reward]] = {}
        for i, part in enumerate(settings):
            label = part.name if part.name not in rewards else f"{part.name}_{i}"
            rewards[label] = (part.weight, build(part.name, dict(part.model_extra or {}), f"rewards.{i}.name"))
        return cls(rewards, log_folder)

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Scores:
        """Scores `[N]` of N images, on the CPU.

        Raises:
            RewardError: a reward returned something other than N numbers.
        """
        parts = {name: self._score(name, reward, prompts, images) for name, (_, reward) in self.rewards.items()}
        total = sum((self.rewards[name][0] * score for name, score in parts.items()), torch.zeros(len(images)))
        return Scores(torch.where(torch.isfinite(total), total, torch.nan), parts)

    def _score(self, name: str, reward: Reward, prompts: Sequence[str], images: Tensor) -> Tensor:
        for attempt in (1, 2):
            try:
                with torch.no_grad():
                    scores = reward(list(prompts), images)
            except FdfoError:
                raise
            except Exception as error:  # noqa: BLE001 - a reward is anybody's code; its failure costs an opinion only
                self._report(name, error, attempt)
                continue
            return _checked(name, scores, len(images))
        return torch.full((len(images),), torch.nan)

    def _report(self, name: str, error: Exception, attempt: int) -> None:
        what = "trying once more" if attempt == 1 else "no opinion on this batch"
        print(f"warning: reward {name!r}: {type(error).__name__}: {error}; {what}", file=sys.stderr)  # noqa: T201
        if self.log_folder is not None:
            self.log_folder.mkdir(parents=True, exist_ok=True)
            with (self.log_folder / f"reward_{name.replace(':', '_')}.log").open("a") as file:
                traceback.print_exception(error, file=file)


def _checked(name: str, scores: Tensor, count: int) -> Tensor:
    try:
        tensor = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward {name!r} returned a {type(scores).__name__}; it takes {count} numbers") from error
    if tensor.shape != (count,):
        got = f"{tensor.shape[0]} scores" if tensor.ndim == 1 else f"shape {tuple(tensor.shape)}"
        raise RewardError(f"reward {name!r} returned {got} for {count} images; it takes one number an image")
    return tensor
