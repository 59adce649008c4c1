"""What looks at the training reward: too many pairs without one, jumps, and epochs without an opinion."""

from __future__ import annotations

import statistics
from collections import deque

import torch

from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.distributed import any_text
from fdfo_engine.runtime.errors import RewardError
from fdfo_engine.training.scoring import Scored

MAX_TIED_EPOCHS = 3
WINDOW = 10
LEAST = 4
LIMIT = 8.0
"""Robust standard deviations from the last epochs' median. Their spread counts as at least a twentieth of the spread
between images: a reward that has settled moves by little, and a little more is no event."""


class RewardWatch:
    """Looks at an epoch's scores, and at what the update made of them."""

    def __init__(self, max_bad_pairs: float, rewards: WeightedRewards) -> None:
        """`max_bad_pairs` is the largest share of pairs without a reward."""
        self._limit, self._rewards = max_bad_pairs, rewards
        self._spikes = SpikeWatch()
        self._tied_epochs = 0

    def jump(self, scored: Scored) -> str | None:
        """A sentence where the mean reward has jumped since the last epochs."""
        known = scored.total[torch.isfinite(scored.total)]
        return self._spikes.seen(float(known.mean()), float(known.std(correction=0))) if len(known) else None

    def lacks_rewards(self, scored: Scored) -> bool:
        """Whether more pairs than may have no reward."""
        return _lost(scored) > self._limit * len(scored.total)

    def require_rewards(self, scored: Scored, epoch: int) -> None:
        """Warns of pairs without a reward; collective.

        Raises:
            RewardError: they are too many to train `epoch`; names the first.
        """
        lost, count = _lost(scored), len(scored.total)
        if lost:
            warn(f"{lost} of {count} pairs have no reward and pull at nothing")
        if self.lacks_rewards(scored):
            raise RewardError(
                f"{lost} of {count} pairs have no reward (update.max_bad_pairs = {self._limit}); "
                f"the run stops before epoch {epoch} changes anything\nthe first: {self._first_lost(scored)}"
            )

    def require_opinions(self, metrics: dict[str, float]) -> None:
        """Warns of an update without an optimiser step.

        Raises:
            RewardError: it is the third in a row.
        """
        if metrics["optimizer_steps"] or metrics["skipped_steps"]:
            self._tied_epochs = 0
            return
        self._tied_epochs += 1
        names = ", ".join(self._rewards.rewards)
        warn(f"no pair has a better image: no optimiser step was taken; is {names} seeing the images?")
        if self._tied_epochs >= MAX_TIED_EPOCHS:
            raise RewardError(f"{MAX_TIED_EPOCHS} epochs in a row without a single opinion from {names}")

    def _first_lost(self, scored: Scored) -> str:
        name, part = next((n, p) for n, p in scored.parts.items() if not torch.isfinite(p).all())
        pair, branch = (~torch.isfinite(part)).nonzero()[0].tolist()
        where = f"pair {scored.rollout.first_pair + pair}, branch {branch}, prompt {scored.prompts[pair]!r}"
        gave = f"reward {name!r} gave {part[pair, branch]:g} to {where}"
        raised = any_text(self._rewards.last_failure.get(name, ""))
        return f"{gave}\nits last exception: {raised}" if raised else gave


def _lost(scored: Scored) -> int:
    return int((~torch.isfinite(scored.total)).any(1).sum())


class SpikeWatch:
    """The mean rewards of the last epochs; in memory, so that a resumed run looks at a few epochs before it judges."""

    def __init__(self) -> None:
        self._means: deque[float] = deque(maxlen=WINDOW)

    def seen(self, mean: float, std: float) -> str | None:
        """Takes an epoch's mean and standard deviation over images; a sentence where the mean has jumped."""
        means = list(self._means)
        self._means.append(mean)
        if len(means) < LEAST:
            return None
        median = statistics.median(means)
        spread = max(1.4826 * statistics.median(abs(m - median) for m in means), 0.05 * std, 1e-9 * abs(median))
        if abs(mean - median) <= LIMIT * spread:
            return None
        what = "collapsed" if mean < median else "exploded"
        return f"the reward {what}: {mean:.4g} after {median:.4g} (median of {len(means)} epochs)"
