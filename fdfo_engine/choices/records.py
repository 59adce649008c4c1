"""One answer of one person about one pair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ChoiceName = Literal["left", "right", "tie", "skip"]


@dataclass(frozen=True)
class Choice:
    """An event of feedback that is a choice.

    Attributes:
        event: its number; later ones are larger.
        round: of the pair. is_comparison: whether that round compares the untrained model (branch 0) with the trained.
        pair, rater: what was judged, by whom.
        choice: as it was shown. rewards: of branch 0 and branch 1; None for a skip.
        is_repeat: whether the pair was shown again, with left and right swapped.
        is_withdrawn: whether it was taken back.
        ms, flips, zooms: how long the rater looked and how often the images were exchanged and enlarged, where known.
        time: seconds since 1970.
    """

    event: int
    round: str
    pair: int
    rater: str
    choice: ChoiceName
    rewards: tuple[float | None, float | None]
    is_comparison: bool = False
    is_repeat: bool = False
    is_withdrawn: bool = False
    ms: int | None = None
    flips: int | None = None
    zooms: int | None = None
    time: float = 0.0

    @property
    def preferred(self) -> Literal[0, 1] | None:
        """The branch that was chosen; None for a tie or a skip."""
        first, second = self.rewards
        if first is None or second is None or first == second:
            return None
        return 0 if first > second else 1


def standing(choices: Iterable[Choice], *, repeats: bool = False) -> list[Choice]:
    """The last answer of each (pair, rater) that was not taken back: to first showings, or to `repeats`."""
    last: dict[tuple[int, str], Choice] = {}
    for choice in sorted(choices, key=lambda choice: choice.event):
        if not choice.is_withdrawn and choice.is_repeat == repeats:
            last[choice.pair, choice.rater] = choice
    return list(last.values())
