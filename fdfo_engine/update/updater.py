"""Optimiser steps on scored rollouts: dealt items, micro-batches through an objective, ZeRO's step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fdfo_engine.config import Config
from fdfo_engine.models.finite import blame
from fdfo_engine.models.flow_model import Conditioning, FlowModel, Network
from fdfo_engine.models.guidance import predict
from fdfo_engine.ops import guided_velocity
from fdfo_engine.runtime.distributed import max_over_ranks
from fdfo_engine.runtime.errors import NumericsError, UsageError
from fdfo_engine.runtime.heap import trim_heap
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage
from fdfo_engine.update.algorithm import Algorithm
from fdfo_engine.update.deal import deal_steps
from fdfo_engine.update.half_precision import GradientScale
from fdfo_engine.update.items import Items
from fdfo_engine.update.objective import Objective, WeightedLogRatios
from fdfo_engine.update.totals import StepResult, Totals, update_metrics, warn_of_still_weights
from fdfo_engine.update.zero import ZeroTrainer

MAX_SKIPPED_IN_A_ROW = 10

Conditioner = Callable[..., tuple[Conditioning, Conditioning | None]]
Reach = Callable[[int, int], None]


@dataclass
class _Accumulation:
    """The gradient between two optimiser steps."""

    has_gradient: bool = False
    is_complete: bool = False
    rollouts: list[Rollout] = field(default_factory=list)


class _Inputs(NamedTuple):
    """What the network sees of some items."""

    latents: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    negative: Conditioning | None


class Updater:
    """Turns scored rollouts into optimiser steps. Collective: every rank calls with its part of the rollout.

    `update` is one epoch. `accumulate` and `step` are what it is made of, for loops that score or weigh by themselves.
    """

    def __init__(
        self,
        model: FlowModel,
        trainer: ZeroTrainer,
        network: Network,
        reference: Network | None,
        config: Config,
        conditioner: Conditioner,
        algorithm: Algorithm,
    ) -> None:
        """`algorithm` has the loss. `micro_batch` may be set before an update.

        `network` is what whole micro-batches go through: `trainer`, or its CUDA graphs; smaller ones take `trainer`.
        `reference` is the untrained network where `update.needs_base`; None switches the LoRA off instead.
        """
        self._model = model
        self._trainer = trainer
        self._network = network
        self._reference = reference
        self._settings = config.update
        self.micro_batch = config.update.micro_batch_items
        self._guidance = config.sampling.guidance_scale
        self._seed = config.run.seed
        self._lr = config.optimizer.lr
        self._conditioner = conditioner
        self.algorithm = algorithm
        self._skipped_in_a_row = 0
        self._accumulation = _Accumulation()
        self._gradient_scale: GradientScale | None = None
        if model.dtype == torch.float16:
            self._gradient_scale = GradientScale((p for _, p in model.trained_parameters()), model.device)

    def update(self, rollout: Rollout, rewards: Tensor, reach: Reach) -> dict[str, float]:
        """Trains on `rollout` with `rewards` `[num_pairs, 2]` of all ranks' pairs; returns metrics over all ranks.

        `reach` is called before each micro-batch, on all ranks alike, with how many are done and there are. What it
        raises ends the update: optimiser steps that were taken stay, gradients of an unfinished one are dropped.

        Raises:
            NumericsError: ten optimiser steps in a row had a gradient that was not finite.
        """
        started, before = time.perf_counter(), self._trainer.weight_bits()
        adv = self.algorithm.advantage(rewards, rollout)
        totals = Totals.zero(self.device)
        shares = self.deal(rollout)
        objective = self.objective(rollout, adv, len(shares))
        for share in shares:
            self.accumulate(rollout, objective, share, totals, reach, parts=len(shares))
            totals.count_step(self.step())
        totals.weights_changed = self._trainer.weight_bits() != before
        metrics = update_metrics(totals, adv, len(shares), time.perf_counter() - started)
        warn_of_still_weights(metrics, self._lr)
        trim_heap()
        return metrics

    def deal(self, rollout: Rollout, parts: int | None = None) -> Tensor:
        """The solver steps of every sample for every optimiser step, int64 `[parts, P, 2, S]` (METHOD, 'Update')."""
        return deal_steps(
            rollout.pair_ids,
            steps=rollout.steps,
            train_steps=self.trained_steps(rollout),
            optimizer_steps=parts or self._settings.optimizer_steps,
            seed=self._seed,
            subset=self._settings.subset,
        )

    def objective(self, rollout: Rollout, adv: Advantage, parts: int, clip_range: float | None = None) -> Objective:
        """The algorithm's loss for one of `parts` optimiser steps on `rollout`."""
        items = self._items_of_a_step(rollout, parts)
        return self.algorithm.objective(adv.values, items, clip_range or self._settings.clip_range)

    def weighted(self, rollout: Rollout, weights: Tensor, share: Tensor, parts: int) -> WeightedLogRatios:
        """A caller's loss by `weights` `[P, 2, S]` of the items `share` `[P, 2, S]`, one of `parts` of `rollout`."""
        spread = torch.zeros(*share.shape[:2], rollout.steps).scatter_(2, share, weights.float())
        items = self._items_of_a_step(rollout, parts)
        return WeightedLogRatios(spread, items, self._settings.clip_range, self.algorithm.log_ratio)

    def _items_of_a_step(self, rollout: Rollout, parts: int) -> int:
        return 2 * rollout.num_pairs * self.trained_steps(rollout) // parts

    def trained_steps(self, rollout: Rollout) -> int:
        """Solver steps of a sample that an epoch trains on."""
        return self._settings.train_steps or rollout.steps

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._model.device

    def accumulate(
        self,
        rollout: Rollout,
        objective: Objective,
        share: Tensor,
        totals: Totals,
        reach: Reach,
        *,
        parts: int = 1,
        more: bool = False,
    ) -> None:
        """Adds the gradient of the items `share` `[P, 2, S]`; `more` leaves the optimiser step open for further ones.

        `reach` is as of `update`, for a caller who accumulates `parts` shares of the same size into `totals`. An error,
        such as one that `reach` raises, drops what the optimiser step had gathered.

        Raises:
            UsageError: the gradient is complete and waits for `step`.
        """
        if self._accumulation.is_complete:
            raise UsageError("forward_backward: the gradient is complete; optim_step comes first, or more=True before")
        micro_batches = self._micro_batches(rollout, objective, share)
        if not more and self._accumulation.has_gradient and not micro_batches:
            micro_batches = [Items.padding()]  # only a backward pass can close the step
        with self._training():
            for i, items in enumerate(micro_batches):
                reach(totals.micro_batches, parts * len(micro_batches))
                self._accumulation.has_gradient = True
                loss = self._loss(rollout, objective, items, totals)
                self._trainer.backward(loss * items.weight, last=not more and i == len(micro_batches) - 1)
                totals.micro_batches += 1
        self._accumulation.rollouts.append(rollout)
        self._accumulation.is_complete = not more

    def step(self, lr: float | None = None) -> StepResult:
        """Applies the gathered gradient, with learning rate `lr` instead of the settings' for this step.

        Raises:
            UsageError: nothing was gathered, or `more` was to come.
            NumericsError: ten optimiser steps in a row had a gradient that was not finite.
        """
        gathered = self._accumulation
        if not gathered.is_complete:
            reason = "forward_backward said that more would come" if gathered.rollouts else "there is no gradient"
            raise UsageError(f"optim_step: {reason}; forward_backward without more=True comes first")
        self._accumulation = _Accumulation()
        if not gathered.has_gradient:
            return StepResult(0.0, applied=False, left_out=True)
        with self._trainer.learning_rate(lr):
            norm, applied = self._trainer.step()
        for rollout in gathered.rollouts:
            rollout.trained_version = self._trainer.step_count
        self._count_skipped(applied)
        return StepResult(norm, applied)

    def discard(self) -> None:
        """Drops what was gathered for the next optimiser step."""
        if self._accumulation.has_gradient:
            self._trainer.discard_gradients()
        self._accumulation = _Accumulation()

    @torch.no_grad()
    def log_ratios(self, rollout: Rollout, share: Tensor) -> Tensor:
        """The log-ratio of each item of `share` `[P, 2, S]`, float32 `[P, 2, S]` on the CPU, at the present weights."""
        everything = torch.ones(len(rollout.pair_ids), dtype=torch.bool)
        own = self._blockwise(rollout, everything, share)
        spare = max_over_ranks(len(own)) - len(own)
        values = [self._log_ratio(rollout, items) for items in own]  # on the device: one copy brings all of them back
        for _ in range(spare):
            self._log_ratio(rollout, Items.padding())
        return torch.cat(values).cpu().view(share.shape)

    def _log_ratio(self, rollout: Rollout, items: Items) -> Tensor:
        velocity = self._velocity(self._trainer, self._inputs(rollout, items))
        return self.algorithm.log_ratio(velocity, rollout, items)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The network in training mode; an error drops the gradient, of which nobody could say what it holds."""
        self._trainer.train()
        try:
            yield
        except BaseException:
            self._accumulation = _Accumulation()
            self._trainer.discard_gradients()
            raise
        finally:
            self._trainer.train(False)

    def _micro_batches(self, rollout: Rollout, objective: Objective, share: Tensor) -> list[Items]:
        """Micro-batches of this rank, padded with weight 0 to the most of any rank; empty if no rank has any."""
        live = torch.ones_like(objective.live) if self._settings.needs_base else objective.live
        own = self._blockwise(rollout, live, share)
        return own + [Items.padding()] * (max_over_ranks(len(own)) - len(own))

    def _blockwise(self, rollout: Rollout, live: Tensor, share: Tensor) -> list[Items]:
        """Micro-batches of the pairs that are `live`, bool `[P]`.

        None reaches across a block: what is computed together, and so its rounding, does not depend on the ranks.
        """
        pairs = live.nonzero().flatten()
        sizes = torch.unique_consecutive(rollout.blocks[pairs], return_counts=True)[1].tolist()
        blocks = pairs.split(sizes)
        return [items for block in blocks for items in Items.of_pairs(block, share).chunks(self.micro_batch)]

    def _loss(self, rollout: Rollout, objective: Objective, items: Items, totals: Totals) -> Tensor:
        network = self._network if len(items) == self.micro_batch else self._trainer
        inputs = self._inputs(rollout, items)
        velocity = self._velocity(network, inputs)
        if self._gradient_scale is not None:
            velocity = self._gradient_scale.widened(velocity)
        loss, ratios = objective.loss(velocity, rollout, items)
        divergence = torch.zeros((), device=self.device)
        if self._settings.needs_base:
            base = self._base_velocity(inputs)
            divergence = mean_square(velocity.float() - base).sum() / objective.normalizer
            growth = velocity_growth(velocity.float(), base).square().sum() / objective.normalizer
            loss = loss + self._settings.kl_weight * divergence + self._settings.velocity_hinge * growth
        if items.weight:
            totals.count_items(loss.detach(), ratios, divergence.detach(), objective.clip_range)
        return loss

    def _inputs(self, rollout: Rollout, items: Items) -> _Inputs:
        prompts = [rollout.prompts[p] for p in items.pair.tolist()]
        latents = rollout.latents(items.pair, items.branch, items.step)
        return _Inputs(latents, rollout.timesteps[items.step], *self._conditioner(prompts))

    def _velocity(self, network: Network, inputs: _Inputs) -> Tensor:
        """Guided and rounded, as the rollout's step used it."""
        v, v_uncond = predict(self._model, network, *inputs, self._guidance)
        return guided_velocity(v, v_uncond, self._guidance)

    @torch.no_grad()
    def _base_velocity(self, inputs: _Inputs) -> Tensor:
        network = self._trainer if self._reference is None else self._reference
        with self._model.without_adapter():
            return self._velocity(network, inputs).float()

    def _count_skipped(self, applied: bool) -> None:
        if applied:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NumericsError(
                f"{self._skipped_in_a_row} optimiser steps in a row had a gradient that is not finite"
                f"{blame(self._model)}"
            )


def mean_square(values: Tensor) -> Tensor:
    """Of each row, `[B]`."""
    return values.square().flatten(1).mean(1)


def velocity_growth(velocity: Tensor, base: Tensor) -> Tensor:
    """By what share the root mean square of each row exceeds that of `base`, `[B]`; 0 where it does not."""
    return (mean_square(velocity) / mean_square(base).clamp_min(1e-12)).sqrt().sub(1).clamp_min(0)
