"""The backends of ops, measured on whole transformers with random weights: `fdfo tune --arch`, and its gain."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.bench.architectures import Architecture
from fdfo_engine.planning.kernel_cache import Batches, KernelCache
from fdfo_engine.planning.kernels import Kernels, conclusion, network_times, pair_times


def measured_architecture(
    architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype, batches: Batches
) -> Kernels:
    """What is fastest here for a fused `network` of `architecture`; measured afresh, and kept in the cache."""
    started = time.perf_counter()

    def forward(batch: int) -> Tensor:
        found: Tensor = network(**architecture.inputs(batch, device, dtype))[0]
        return found

    passes = [partial(forward, batches.rollout), partial(forward, batches.train)]
    timed = network_times(network, device, passes, {})
    timed |= pair_times(architecture.latent_shape, dtype, device, batches, {})
    cache = KernelCache(device, batches)
    return conclusion(timed, {}, cache, batches, time.perf_counter() - started)
