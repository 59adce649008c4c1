"""One epoch's update: dealt micro-batches through the loss into ZeRO optimiser steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import Conditioning, FlowModel, Network
from fdfo_engine.models.guidance import predict
from fdfo_engine.ops import fdfo_loss, guided_velocity
from fdfo_engine.runtime.distributed import all_sum, max_over_ranks
from fdfo_engine.runtime.errors import NumericsError
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import Advantage, advantage
from fdfo_engine.update.deal import deal_steps
from fdfo_engine.update.zero import ZeroTrainer

MAX_SKIPPED_IN_A_ROW = 10

Conditioner = Callable[..., tuple[Conditioning, Conditioning | None]]


@dataclass(frozen=True)
class Items:
    """(sample, step) items of this rank, int64 `[B]` each; `pair` is a row of the rollout; weight 0 pads."""

    pair: Tensor
    branch: Tensor
    step: Tensor
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.pair)

    def chunks(self, size: int) -> list[Items]:
        """Consecutive micro-batches of at most `size` items."""
        parts = zip(self.pair.split(size), self.branch.split(size), self.step.split(size), strict=True)
        return [Items(*part) for part in parts]


@dataclass
class Totals:
    """Sums over items and optimiser steps, reduced over ranks once at the end."""

    sums: Tensor
    floor: float | None = None
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    left_out: int = 0

    @classmethod
    def zero(cls, device: torch.device) -> Totals:
        """All sums at 0 on `device`."""
        return cls(torch.zeros(5, dtype=torch.float64, device=device))

    def add(self, *values: Tensor | float, weight: float) -> None:
        """Adds one micro-batch's loss, log-ratios, clipped items, divergence and items, without a host sync."""
        self.sums += weight * torch.stack([torch.as_tensor(v, device=self.sums.device).double() for v in values])


class Updater:
    """Turns a scored rollout into optimiser steps. Collective: every rank calls `update` with its part."""

    def __init__(
        self,
        model: FlowModel,
        trainer: ZeroTrainer,
        network: Network,
        reference: Network | None,
        config: Config,
        conditioner: Conditioner,
        backend: str,
    ) -> None:
        """`backend` runs the loss (`ops.backend_for`). `micro_batch` may be set before an update.

        `network` is what whole micro-batches go through: `trainer`, or its CUDA graphs; smaller ones take `trainer`.
        `reference` is the untrained network for `update.kl_weight`; None switches the LoRA off instead.
        """
        self._model = model
        self._trainer = trainer
        self._network = network
        self._reference = reference
        self._settings = config.update
        self.micro_batch = config.update.micro_batch_items
        self._guidance = config.sampling.guidance_scale
        self._seed = config.run.seed
        self._conditioner = conditioner
        self._backend = backend
        self._skipped_in_a_row = 0
        self.poll: Callable[[], None] = lambda: None

    def update(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """Trains on `rollout` with `rewards` `[P, 2]` of this rank's pairs; returns metrics over all ranks.

        Raises:
            NumericsError: ten optimiser steps in a row had a gradient that was not finite.
        """
        started = time.perf_counter()
        train_steps = self._settings.train_steps or rollout.steps
        shares = deal_steps(
            rollout.pair_ids,
            steps=rollout.steps,
            train_steps=train_steps,
            optimizer_steps=self._settings.optimizer_steps,
            seed=self._seed,
        )
        adv = advantage(rewards, rollout.direction)
        totals = Totals.zero(self._model.device)
        batch = 2 * rollout.num_pairs * train_steps // self._settings.optimizer_steps
        self._trainer.train()
        for share in shares:
            self._optimizer_step(rollout, adv, share, batch, totals)
        self._trainer.train(False)
        return _metrics(totals, adv, len(shares), time.perf_counter() - started)

    def _optimizer_step(self, rollout: Rollout, adv: Advantage, share: Tensor, batch: int, totals: Totals) -> None:
        micro_batches = self._micro_batches(rollout, adv, share)
        if not micro_batches:
            totals.left_out += 1
            return
        for i, items in enumerate(micro_batches):
            self.poll()
            loss = self._loss(rollout, adv, items, batch, totals)
            self._trainer.backward(loss * items.weight, last=i == len(micro_batches) - 1)
        norm, applied = self._trainer.step()
        self._count_step(norm, applied, totals)

    def _micro_batches(self, rollout: Rollout, adv: Advantage, share: Tensor) -> list[Items]:
        """Micro-batches of this rank, padded with weight 0 to the most of any rank; empty if no rank has any.

        None reaches across a block: what is computed together, and so its rounding, does not depend on the ranks.
        """
        pairs = torch.arange(len(adv.values)) if self._settings.kl_weight else adv.live.nonzero().flatten()
        blocks = pairs.split(torch.unique_consecutive(rollout.blocks[pairs], return_counts=True)[1].tolist())
        own = [items for block in blocks for items in _items(block, share).chunks(self.micro_batch)]
        zero = torch.zeros(1, dtype=torch.int64)
        return own + [Items(zero, zero, zero, weight=0.0)] * (max_over_ranks(len(own)) - len(own))

    def _loss(self, rollout: Rollout, adv: Advantage, items: Items, batch: int, totals: Totals) -> Tensor:
        device = self._model.device
        pair, branch, step = items.pair, items.branch, items.step
        latents = rollout.latents(pair, branch, step)
        timesteps = rollout.timesteps[step]
        prompts = [rollout.prompts[p] for p in pair.tolist()]
        conditioning, negative = self._conditioner(prompts)
        network = self._network if len(items) == self.micro_batch else self._trainer
        v = self._velocity(network, latents, timesteps, conditioning, negative)
        signed = adv.values[pair, branch].to(device)
        loss, log_ratio = fdfo_loss(
            v,
            rollout.velocities[pair, branch, step],
            rollout.direction,
            signed,
            clip_range=self._settings.clip_range,
            pair=pair,
            branch=branch,
            normalizer=float(batch),
            backend=self._backend,
        )
        kl = torch.zeros((), device=device)
        if self._settings.kl_weight:
            divergence = (v.float() - self._base_velocity(latents, timesteps, conditioning, negative)).square()
            kl = divergence.flatten(1).mean(1).sum() / batch
            loss = loss + self._settings.kl_weight * kl
        self._count_items(loss.detach(), log_ratio, kl.detach(), items.weight, totals)
        return loss

    @torch.no_grad()
    def _base_velocity(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        network = self._trainer if self._reference is None else self._reference
        with self._model.without_adapter():
            return self._velocity(network, latents, timesteps, conditioning, negative).float()

    def _velocity(
        self,
        network: Network,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        negative: Conditioning | None,
    ) -> Tensor:
        """Guided and rounded, as the rollout's step used it."""
        v, v_uncond = predict(self._model, network, latents, timesteps, conditioning, negative, self._guidance)
        return guided_velocity(v, v_uncond, self._guidance)

    def _count_items(self, loss: Tensor, log_ratio: Tensor, kl: Tensor, weight: float, totals: Totals) -> None:
        clipped = ((log_ratio.exp() - 1).abs() >= self._settings.clip_range).sum()
        totals.add(loss, log_ratio.double().sum(), clipped, kl, len(log_ratio), weight=weight)
        if totals.floor is None and weight:
            totals.floor = float(log_ratio.abs().mean())

    def _count_step(self, norm: float, applied: bool, totals: Totals) -> None:
        if applied:
            self._skipped_in_a_row = 0
            totals.grad_norms.append(norm)
            return
        totals.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NumericsError(f"{self._skipped_in_a_row} optimiser steps in a row had a gradient that is not finite")


def _items(pairs: Tensor, share: Tensor) -> Items:
    """Every (sample, step) of `pairs` that `share` `[P, 2, S]` gives this optimiser step, trajectory by trajectory."""
    steps = share[pairs]
    pair = pairs[:, None, None].expand_as(steps).flatten()
    branch = torch.arange(2)[None, :, None].expand_as(steps).flatten()
    return Items(pair, branch, steps.flatten())


def _metrics(totals: Totals, adv: Advantage, optimizer_steps: int, seconds: float) -> dict[str, float]:
    counts = torch.stack([adv.lost.sum(), adv.tied.sum(), adv.still.sum()]).double()
    magnitude = torch.tensor([float(adv.values[:, 0].abs().sum()), float(len(adv.values))], dtype=torch.float64)
    totals_over_ranks = all_sum(torch.cat([counts, totals.sums.cpu(), magnitude])).tolist()
    lost, tied, still, loss, log_ratio, clipped, kl, items, size, pairs = totals_over_ranks
    applied = totals.grad_norms
    return {
        "loss": loss / optimizer_steps,
        "log_ratio_mean": log_ratio / max(items, 1),
        "log_ratio_floor": totals.floor if totals.floor is not None else 0.0,
        "clip_fraction": clipped / max(items, 1),
        "kl": kl / optimizer_steps,
        "grad_norm": sum(applied) / len(applied) if applied else 0.0,
        "advantage_abs_mean": size / max(pairs, 1),
        "lost_pairs": int(lost),
        "tied_pairs": int(tied),
        "zero_direction_pairs": int(still),
        "optimizer_steps": len(applied),
        "skipped_steps": totals.skipped,
        "left_out_steps": totals.left_out,
        "seconds_update": seconds,
    }
