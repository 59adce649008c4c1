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
    ids = torch.tensor(pair_ids, dtype=torch.int64)[:, None, None]
    words = philox_words(torch.arange(steps), deal_stream(torch.arange(2))[:, None], ids, seed=seed)  # [P, 2, T]
    dealt = words.argsort(dim=-1, stable=True)[..., :train_steps]
    shares = dealt.unflatten(2, (optimizer_steps, -1)).permute(2, 0, 1, 3)
    ascending: Tensor = shares.sort(-1).values
    return ascending
