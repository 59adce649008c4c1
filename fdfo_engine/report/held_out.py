"""What a run has gained on held-out prompts: the one number that counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fdfo_engine.report.curves import short

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class HeldOutChange:
    """The run's reward at the first and at the last evaluation.

    Attributes:
        before: mean at the first.
        after: mean at the last.
        half_width: of the 95% interval of the difference, taken as if the images of both were independent; as they
            share prompts and noise, the truth is rather narrower. NaN where an error is not known.
    """

    before: float
    after: float
    half_width: float
    first_epoch: int
    last_epoch: int
    count: int

    @property
    def headline(self) -> str:
        """Both numbers."""
        return f"{self.before:.3g} → {self.after:.3g}"

    @property
    def interval(self) -> str:
        """The difference with its interval."""
        difference = self.after - self.before
        if not math.isfinite(self.half_width):
            return f"{difference:+.3g}"
        low, high = difference - self.half_width, difference + self.half_width
        return f"{difference:+.3g}, 95% interval {low:.3g} to {high:.3g}"

    @property
    def remark(self) -> str:
        """Under the headline."""
        return f"{self.interval}; {self.count} images, epoch {self.first_epoch} → {self.last_epoch}"

    @property
    def sentence(self) -> str:
        """In words."""
        difference = self.after - self.before
        is_clear = math.isfinite(self.half_width) and abs(difference) > self.half_width
        moved = ("rose" if difference > 0 else "fell") if is_clear else "did not clearly change"
        start = "before training" if self.first_epoch == 0 else f"at epoch {self.first_epoch}"
        return (
            f"On held-out prompts the reward {moved}: {short(self.before)} {start}, {short(self.after)} at epoch "
            f"{self.last_epoch} ({self.interval})."
        )


def held_out_change(evaluations: Sequence[Mapping[str, Any]]) -> HeldOutChange | None:
    """From the first evaluation to the last of the same weights; None where there are not two with a reward."""
    known = [e for e in evaluations if math.isfinite(_number(e.get("reward")))]
    if not known:
        return None
    last = known[-1]
    first = next(e for e in known if e.get("weights") == last.get("weights") or e["epoch"] == 0)
    if first["epoch"] >= last["epoch"]:
        return None
    half_width = _NORMAL_95 * math.hypot(_number(first.get("reward_stderr")), _number(last.get("reward_stderr")))
    count = int(last.get("count") or 0)
    return HeldOutChange(first["reward"], last["reward"], half_width, first["epoch"], last["epoch"], count)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
