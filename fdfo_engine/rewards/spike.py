"""Notices a training reward that collapses or explodes from one epoch to the next."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 10
LEAST = 4
LIMIT = 8.0
"""Robust standard deviations from the last epochs' median. Their spread counts as at least a twentieth of the spread
between images: a reward that has settled moves by little, and a little more is no event."""


class SpikeWatch:
    """The mean rewards of the last epochs; in memory, so that a resumed run looks at a few epochs before it judges."""

    def __init__(self) -> None:
        self._means: deque[float] = deque(maxlen=WINDOW)

    def seen(self, mean: float, std: float) -> str | None:
        """Takes an epoch's mean and standard deviation over images; a sentence where the mean has jumped."""
        means = list(self._means)
        self._means.append(mean)
        if len(means) < LEAST:
            return None
        median = statistics.median(means)
        spread = max(1.4826 * statistics.median(abs(m - median) for m in means), 0.05 * std, 1e-9 * abs(median))
        if abs(mean - median) <= LIMIT * spread:
            return None
        what = "collapsed" if mean < median else "exploded"
        return f"the reward {what}: {mean:.4g} after {median:.4g} (median of {len(means)} epochs)"
