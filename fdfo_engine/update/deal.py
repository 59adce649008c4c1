"""Which (sample, step) goes to which optimiser step: a function of (seed, pair, branch), never of ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.ops import deal_stream, philox_words


def deal_steps(pair_ids: Sequence[int], *, steps: int, train_steps: int, optimizer_steps: int, seed: int) -> Tensor:
    """Solver steps of every sample for every optimiser step, int64 `[G, P, 2, train_steps / G]`, ascending.

    For each sample its T steps are sorted by Philox words; the first `train_steps` are kept and shared out equally,
    so each optimiser step sees every sample (METHOD, 'Update').
    """
    if train_steps % optimizer_steps:
        raise ValueError(f"deal_steps: train_steps = {train_steps} is no multiple of {optimizer_steps} optimizer steps")
    index = torch.arange(steps)
    rows = [
        [torch.argsort(_words(index, branch, pair, seed), stable=True)[:train_steps] for branch in (0, 1)]
        for pair in pair_ids
    ]
    if not rows:
        return torch.empty(optimizer_steps, 0, 2, train_steps // optimizer_steps, dtype=torch.int64)
    dealt = torch.stack([torch.stack(row) for row in rows])  # [P, 2, train_steps]
    shares = dealt.unflatten(2, (optimizer_steps, -1)).permute(2, 0, 1, 3)
    return shares.sort(-1).values


def _words(index: Tensor, branch: int, pair: int, seed: int) -> Tensor:
    return torch.as_tensor(philox_words(index, deal_stream(branch), pair, seed=seed))
