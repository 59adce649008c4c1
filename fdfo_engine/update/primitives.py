"""The update taken apart: for training loops that a caller writes, in this process or over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.runtime.distributed import all_gather_rows, all_sum
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.runtime.progress import Progress
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage, given_advantage
from fdfo_engine.update.objective import Objective
from fdfo_engine.update.totals import StepResult, Totals
from fdfo_engine.update.updater import Updater
from fdfo_engine.update.zero import ZeroTrainer


@dataclass(frozen=True)
class LogRatios:
    """The log-ratio of each item of one part of a rollout, over all ranks.

    Attributes:
        values: float32 `[P, 2, S]`: pair, branch, and S solver steps each.
        steps: which solver steps these are, int64 `[P, 2, S]`.
    """

    values: Tensor
    steps: Tensor


class Primitives:
    """`Engine.update`, in pieces: `forward_backward` and `optim_step` for each part, then `Engine.end_epoch`.

    Every method is collective, and takes the whole rollout's numbers on each rank. A loop of `forward_backward` with
    rewards and `optim_step` over `parts = update.optimizer_steps` gives the bits of `Engine.update`.
    """

    def __init__(self, updater: Updater, trainer: ZeroTrainer, parts: int, progress: Progress) -> None:
        """`parts` is what a rollout is cut into unless a call says otherwise."""
        self._updater, self._trainer, self._parts, self._progress = updater, trainer, parts, progress

    def forward(self, rollout: Rollout, *, part: int = 0, parts: int | None = None) -> LogRatios:
        """The log-ratios of part `part` of `parts`, at the present weights, without a gradient.

        Raises:
            UsageError: `part` is none of `parts`, or `parts` does not divide the trained steps.
        """
        share = self._share(rollout, part, parts)
        values = self._updater.log_ratios(rollout, share)
        return LogRatios(all_gather_rows(values), all_gather_rows(share))

    def forward_backward(
        self,
        rollout: Rollout,
        *,
        rewards: Tensor | None = None,
        advantages: Tensor | None = None,
        weights: Tensor | None = None,
        clip_range: float | None = None,
        part: int = 0,
        parts: int | None = None,
        more: bool = False,
        allow_stale: bool = False,
    ) -> dict[str, float]:
        """Adds the gradient of one part of `rollout`; exactly one of rewards, advantages and weights says of what.

        Args:
            rewards: float `[P, 2]`; NaN in either branch is no opinion on that pair. The algorithm's loss.
            advantages: float `[P, 2]`, signed for each branch; otherwise as rewards.
            weights: float `[P, 2, S]`, finite: `dL/dl` of each item of `forward`, for any loss of the log-ratios l.
            clip_range: METHOD's c, instead of `update.clip_range`; not with weights.
            part, parts: which of how many equal shares of the trained steps; by default `update.optimizer_steps`.
            more: whether this optimiser step takes further gradients before `optim_step`.
            allow_stale: train although other rollouts have moved the weights since it was sampled.

        Returns:
            `loss`, `log_ratio_mean`, `log_ratio_largest` (magnitude), `clip_fraction`, `distance_rms` (of the pairs'
            latents), `zero_gradient_share` (pairs that pull at nothing), `items`, over all ranks.

        Raises:
            UsageError: an argument does not fit; the rollout is stale; `optim_step` is due.
            Cancelled: `Engine.cancel` was called; what this optimiser step had gathered is dropped.
        """
        if not allow_stale:
            rollout.require_fresh(self._trainer.step_count)
        count = parts or self._parts
        share = self._share(rollout, part, count)
        given = _only_one(rewards=rewards, advantages=advantages, weights=weights)
        if clip_range is not None and (given == "weights" or clip_range <= 0):
            raise UsageError(f"forward_backward: clip_range = {clip_range}: takes a number above 0, and no weights")
        objective: Objective
        if weights is not None:
            objective = self._updater.weighted(
                rollout, _rows(rollout, "weights", weights, share.shape[2]), share, count
            )
        else:
            signed = self._advantage(rollout, rewards, advantages)
            objective = self._updater.objective(rollout, signed, count, clip_range)
        totals = Totals.zero(self._updater.device)
        with self._progress.phase("update", unit="micro-batches") as phase:
            self._updater.accumulate(rollout, objective, share, totals, phase.reach, more=more)
        return _answer(rollout, objective, totals)

    def optim_step(self, lr: float | None = None) -> StepResult:
        """Applies what `forward_backward` gathered; `lr` replaces `optimizer.lr` for this step.

        Raises:
            UsageError: nothing was gathered, more was announced, or `lr` is no number above 0.
            NumericsError: ten optimiser steps in a row had a gradient that was not finite.
        """
        if lr is not None and not 0 < lr < float("inf"):
            raise UsageError(f"optim_step: lr = {lr}: takes a number above 0")
        return self._updater.step(lr)

    def discard(self) -> None:
        """Drops the gradients gathered since the last optimiser step."""
        self._updater.discard()

    def _advantage(self, rollout: Rollout, rewards: Tensor | None, advantages: Tensor | None) -> Advantage:
        if rewards is not None:
            return self._updater.algorithm.advantage(_of_pairs(rollout, "rewards", rewards), rollout)
        return given_advantage(_rows(rollout, "advantages", advantages), rollout.direction)

    def _share(self, rollout: Rollout, part: int, parts: int | None) -> Tensor:
        count = parts or self._parts
        trained = self._updater.trained_steps(rollout)
        if not 1 <= count <= trained or trained % count:
            raise UsageError(f"parts = {count}: takes a divisor of the {trained} trained steps of a sample")
        if not 0 <= part < count:
            raise UsageError(f"part = {part}: takes 0 to {count - 1}, of {count} parts")
        return self._updater.deal(rollout, count)[part]


def _only_one(**arguments: Tensor | None) -> str:
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise UsageError(f"forward_backward: takes one of {', '.join(arguments)}; got {' and '.join(given) or 'none'}")
    return given[0]


def _rows(rollout: Rollout, name: str, values: Any, *rest: int) -> Tensor:
    """This rank's rows of the global `values`."""
    return _of_pairs(rollout, name, values, *rest)[rollout.local_rows]


def _of_pairs(rollout: Rollout, name: str, values: Any, *rest: int) -> Tensor:
    """The global `values` `[P, 2, *rest]`, float64 on the CPU."""
    values_PK: Tensor = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    shape, axes = (rollout.num_pairs, 2, *rest), ", ".join(("pair", "branch", "step")[: 2 + len(rest)])
    if values_PK.shape != shape:
        raise UsageError(f"{name}: shape {list(values_PK.shape)}; takes {list(shape)}: {axes}")
    if rest and not torch.isfinite(values_PK).all():
        raise UsageError(f"{name}: hold a number that is not finite; takes 0 where an item is to pull at nothing")
    return values_PK


def _answer(rollout: Rollout, objective: Objective, totals: Totals) -> dict[str, float]:
    summary = totals.over_ranks()
    distances = rollout.distance.double()
    own = torch.stack([distances.square().sum(), torch.tensor(len(distances)).double(), objective.live.sum().double()])
    squares, pairs, live = all_sum(own).tolist()
    return {
        "loss": summary.loss,
        "log_ratio_mean": summary.log_ratio_mean,
        "log_ratio_largest": summary.log_ratio_largest,
        "clip_fraction": summary.clip_fraction,
        "distance_rms": (squares / pairs) ** 0.5,
        "zero_gradient_share": 1 - live / pairs,
        "items": summary.items,
    }
