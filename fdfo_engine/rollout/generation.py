"""Churn-free images of a list of prompts: this rank's share of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fdfo_engine.models.flow_model import Grid, Network
from fdfo_engine.rollout.blocks import in_step, share
from fdfo_engine.rollout.sampler import PairedSampler
from fdfo_engine.runtime.distributed import together, world_size
from fdfo_engine.runtime.progress import Phase


def generate_share(
    sampler: PairedSampler,
    network: Network,
    prompts: Sequence[str],
    phase: Phase,
    *,
    batch: int,
    first: int,
    seed: int,
    grid: Grid,
    guidance: float,
) -> Tensor:
    """Images `[n, 3, height, width]` of this rank's batches of `prompts`, on the CPU; collective.

    Every batch holds `batch` prompts, the last one repeated: results do not depend on how many there are. Image i takes
    the noise of index `first + i`.
    """
    count = len(prompts)
    own = share(-(-count // batch), "batches", may_idle=True)
    images = []
    for i, number in enumerate(in_step(own)):
        phase.reach(min(i * world_size() * batch, count))
        rows = [min(row, count - 1) for row in range(number * batch, (number + 1) * batch)]
        texts, ids = [prompts[row] for row in rows], [first + row for row in rows]
        draw = partial(sampler.generate_batch, network, texts, ids, seed=seed, grid=grid, guidance=guidance)
        images.append(together(draw).cpu())
    return torch.cat(images)[: max(0, min(own.stop * batch, count) - own.start * batch)]
