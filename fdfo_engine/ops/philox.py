"""Philox4x32-10: random words as a function of (seed, pair, stream, index), and the names of the streams.

Source: METHOD, 'Noise is a function, not a state'; Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from fdfo_engine.ops import _checks

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

SHARED_STREAM = 0
"""Initial noise that both branches of a pair share."""
RENOISE_STREAM = 2**29
"""Of noise that is mixed into a final latent again, branch 0 at step 0; see `renoise_stream`."""
GENERATION_STREAM = 2**30
"""Initial noise of churn-free images; the pair is the image's index in its list."""
SCALAR_STREAM = 2**31
"""The pair's own scalars: element 0 is the N(0, 1) behind its churn schedule."""
DEAL_STREAM = 2**31 + 1
"""Of branch 0; branch 1 has the next one. Sorts the steps of a sample: see `deal_stream`."""
PROMPT_ORDER_STREAM = 2**31 + 3
"""Sorts the prompts of one pass; the pair is the number of the pass."""
IMPORTANCE_STREAM = 2**31 + 4
"""Decides which pairs are trained: see `algorithm.importance_share`."""

Branch = TypeVar("Branch", int, Tensor)
Words = tuple[Tensor, Tensor, Tensor, Tensor]
Integers = int | Sequence[int] | Tensor | npt.NDArray[Any]


def churn_stream(k: int | Branch, branch: Branch) -> Branch:
    """Stream of the fresh noise at grid point k (0: the prior; step i has k = i + 1); `branch` an int or a tensor."""
    return branch + (1 + 2 * k)


def renoise_stream(step: Branch, branch: Branch) -> Branch:
    """Stream of the noise that a final latent is mixed with again at the time of `step`."""
    return branch + 2 * step + RENOISE_STREAM


def deal_stream(branch: Branch) -> Branch:
    """Stream whose word 0 at index i sorts step i of a sample among the optimiser steps."""
    return branch + DEAL_STREAM


def philox_words(index: Integers, stream: Integers, pair: Integers, *, seed: int) -> Tensor:
    """Word 0 of Philox at counters `(index, stream, pair_lo, pair_hi)`: what deals and permutations sort by.

    Args:
        index, stream: integers in 0..2^32-1: an int, a sequence, an array or an int64 tensor.
        pair: the same, in 0..2^63-1. The three broadcast against each other.
        seed: int in 0..2^64-1.

    Returns:
        int64 of the broadcast shape, each word in 0..2^32-1, on the device of the tensors among the arguments (the
        CPU without any). Repeats bit for bit everywhere.

    Raises:
        ValueError: a value is out of range, or not an integer.
    """
    limits = {"index": 2**32, "stream": 2**32, "pair": 2**63}
    values = zip(limits.items(), (index, stream, pair), strict=True)
    index_, stream_, pair_ = (_counter(name, value, limit) for (name, limit), value in values)
    words = philox4x32((index_, stream_, pair_ & MASK, pair_ >> 32), key_of(_checks.seed("philox_words", seed)))
    return words[0]


def key_of(seed: int) -> tuple[int, int]:
    """The key of a 64-bit seed: low word, high word."""
    return seed & MASK, seed >> 32


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """The four output words at `counter`, each int64 in 0..2^32-1; the counter's tensors broadcast.

    No checks: every input word must be in 0..2^32-1. An int64 product wraps modulo 2^64, which keeps its bits; the
    mask after the shift drops the copies of the sign.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + KEY_STEPS[0] & MASK, k1 + KEY_STEPS[1] & MASK
    return c0, c1, c2, c3


def _counter(name: str, value: Integers, limit: int) -> Tensor:
    try:
        out = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"philox_words: {name} is {value!r}; it takes integers in 0..{limit - 1}") from error
    if out.numel() and (out.dtype != torch.int64 or int(out.min()) < 0 or int(out.max()) >= limit):
        _checks.refuse("philox_words", name, f"{out.dtype} {value!r}", f"int64 values in 0..{limit - 1}")
    return out.long()
