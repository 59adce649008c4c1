"""Confidence intervals of a mean over prompts; of a difference, for the same prompts and seeds, the paired ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

_CHUNK = 500


@dataclass(frozen=True)
class Interval:
    """A mean with its standard error and interval, over `count` numbers; NaN where too few are known."""

    mean: float
    stderr: float
    low: float
    high: float
    count: int


def t_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval `m +- t_{(1 + c) / 2, n - 1} * s / sqrt(n)` of the mean of `values`; NaN are left out.

    For base against tuned give it the differences prompt by prompt: it is then the interval of the paired t test.
    """
    known = _finite(values)
    n = len(known)
    mean = float(known.mean()) if n else float("nan")
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), float("nan"), n)
    stderr = float(known.std(ddof=1)) / n**0.5
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * stderr
    return Interval(mean, stderr, mean - half, mean + half, n)


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (Efron and Tibshirani 1993, chapter 13).

    Resamples prompts with replacement; the same `seed` gives the same interval. NaN are left out.
    """
    known = _finite(values)
    if len(known) < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    means = []
    for first in range(0, resamples, _CHUNK):
        rows = generator.integers(0, len(known), (min(_CHUNK, resamples - first), len(known)))
        means.append(known[rows].mean(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]
