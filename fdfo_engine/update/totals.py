"""Sums over items and optimiser steps, and the metrics made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.distributed import all_gather_rows, all_sum, any_rank
from fdfo_engine.update.advantage import Advantage


@dataclass(frozen=True)
class StepResult:
    """One optimiser step: the gradient's norm before clipping, and what became of it."""

    grad_norm: float
    applied: bool
    left_out: bool = False
    """No item pulled at the weights, so there was nothing to apply."""


@dataclass
class Totals:
    """Of this rank; reduced over ranks once, when they are read.

    Attributes:
        sums: loss, log-ratios, clipped items, divergence, items; float64 `[5]` on the device.
        largest: the largest magnitude of a log-ratio, float64 `[1]` on the device.
        floor: mean magnitude of the log-ratios of the first micro-batch, on the device: 0 where training computes as
            sampling did.
        micro_batches: how many were computed, padding too.
        weights_changed: whether any weight of this rank's has another value than before.
    """

    sums: Tensor
    largest: Tensor
    floor: Tensor | None = None
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    left_out: int = 0
    micro_batches: int = 0
    weights_changed: bool = False

    @classmethod
    def zero(cls, device: torch.device) -> Totals:
        """All sums at 0 on `device`."""
        return cls(
            torch.zeros(5, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.float64, device=device)
        )

    def count_items(self, loss: Tensor, log_ratios: Tensor, divergence: Tensor, clip_range: float) -> None:
        """Adds one micro-batch, without waiting for the device."""
        ratios = log_ratios.double()
        clipped = ((log_ratios.exp() - 1).abs() >= clip_range).sum()
        items = torch.full((), len(ratios), device=ratios.device)
        self.sums += torch.stack([value.double() for value in (loss, ratios.sum(), clipped, divergence, items)])
        self.largest = torch.maximum(self.largest, ratios.abs().max())
        if self.floor is None:
            self.floor = log_ratios.abs().mean()

    def count_step(self, step: StepResult) -> None:
        """Adds one optimiser step."""
        if step.left_out:
            self.left_out += 1
        elif step.applied:
            self.grad_norms.append(step.grad_norm)
        else:
            self.skipped += 1

    def over_ranks(self) -> Summary:
        """What all ranks counted. Collective."""
        loss, log_ratio, clipped, divergence, items = all_sum(self.sums).tolist()
        return Summary(
            loss=loss,
            log_ratio_mean=log_ratio / max(items, 1),
            log_ratio_largest=float(all_gather_rows(self.largest).max()),
            clip_fraction=clipped / max(items, 1),
            divergence=divergence,
            items=int(items),
        )


@dataclass(frozen=True)
class Summary:
    """Items over all ranks: sums of loss and divergence, of the log-ratios mean and largest magnitude."""

    loss: float
    log_ratio_mean: float
    log_ratio_largest: float
    clip_fraction: float
    divergence: float
    items: int


def update_metrics(totals: Totals, adv: Advantage, optimizer_steps: int, seconds: float) -> dict[str, float]:
    """The metrics of one epoch's update over all ranks. Collective."""
    summary = totals.over_ranks()
    counts = torch.stack([adv.lost.sum(), adv.tied.sum(), adv.still.sum()]).double()
    magnitude = torch.tensor([float(adv.values[:, 0].abs().sum()), float(len(adv.values))], dtype=torch.float64)
    lost, tied, still, size, pairs = all_sum(torch.cat([counts, magnitude])).tolist()
    applied = totals.grad_norms
    return {
        "loss": summary.loss / optimizer_steps,
        "log_ratio_mean": summary.log_ratio_mean,
        "log_ratio_largest": summary.log_ratio_largest,
        "log_ratio_floor": float(totals.floor) if totals.floor is not None else 0.0,
        "clip_fraction": summary.clip_fraction,
        "kl": summary.divergence / optimizer_steps,
        "grad_norm": sum(applied) / len(applied) if applied else 0.0,
        "advantage_abs_mean": size / max(pairs, 1),
        "lost_pairs": int(lost),
        "tied_pairs": int(tied),
        "zero_direction_pairs": int(still),
        "trained_items": summary.items,
        "optimizer_steps": len(applied),
        "skipped_steps": totals.skipped,
        "left_out_steps": totals.left_out,
        "weights_changed": int(any_rank(totals.weights_changed)),
        "seconds_update": seconds,
    }


def warn_of_still_weights(metrics: dict[str, float], lr: float) -> None:
    """Warns of optimiser steps that were applied and changed nothing: the run would go on so, and learn nothing."""
    if metrics["optimizer_steps"] and not metrics["weights_changed"]:
        warn(
            f"{metrics['optimizer_steps']} optimiser steps were applied and no weight has changed: at optimizer.lr = "
            f"{lr:g} every change is below what the weights' own rounding keeps"
        )
