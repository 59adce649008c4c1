"""Which (sample, step) goes to which optimiser step: a function of (seed, pair, branch), never of ranks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fdfo_engine.ops import deal_stream, philox_words

Subset = Literal["random", "stratified"]


def deal_steps(
    pair_ids: Sequence[int],
    *,
    steps: int,
    train_steps: int,
    optimizer_steps: int,
    seed: int,
    subset: Subset = "random",
) -> Tensor:
    """Solver steps of every sample for every optimiser step, int64 `[G, P, 2, train_steps / G]`, ascending.

    For each sample its T steps are sorted by Philox words; the first `train_steps` are kept and shared out equally,
    so each optimiser step sees every sample (METHOD, 'Update'). A `stratified` subset keeps the first of each stretch
    of `steps / train_steps` neighbours instead.
    """
    if train_steps % optimizer_steps:
        raise ValueError(f"deal_steps: train_steps = {train_steps} is no multiple of {optimizer_steps} optimizer steps")
    ids = torch.tensor(pair_ids, dtype=torch.int64)[:, None, None]
    words = philox_words(torch.arange(steps), deal_stream(torch.arange(2))[:, None], ids, seed=seed)  # [P, 2, T]
    kept = _one_a_stretch(words, train_steps) if subset == "stratified" else words
    dealt = kept.argsort(dim=-1, stable=True)[..., :train_steps]
    shares = dealt.unflatten(2, (optimizer_steps, -1)).permute(2, 0, 1, 3)
    ascending: Tensor = shares.sort(-1).values
    return ascending


def _one_a_stretch(words: Tensor, count: int) -> Tensor:
    """`words` `[..., T]` with all but the least of each of `count` equal stretches put behind all others."""
    stretches = words.unflatten(-1, (count, -1))
    first = stretches == stretches.amin(-1, keepdim=True)
    return torch.where(first, stretches, stretches + 2**32).flatten(-2)
