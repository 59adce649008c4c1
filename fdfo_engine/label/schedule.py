"""Which pair is shown when: a function of the round and the rater, so that a restart goes on with the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fdfo_engine.choices import Choice

LEAST_GAP = 10
"""A pair comes back after at least so many others."""


@dataclass(frozen=True)
class Showing:
    """A pair on the screen; a repeat has left and right swapped."""

    pair: int
    is_repeat: bool = False


@dataclass(frozen=True)
class Due:
    """A showing that waits for an answer; `attempt` counts the answers to it that were taken back."""

    showing: Showing
    attempt: int


def showings(pairs: Sequence[int], share: float, rater: str) -> list[Showing]:
    """All pairs in their order, and `share` of them once more, each at least `LEAST_GAP` places later."""
    repeatable = pairs[: max(0, len(pairs) - LEAST_GAP)]
    count = min(len(repeatable), round(share * len(pairs)) or int(share > 0))
    chosen = sorted(repeatable, key=lambda pair: _chance("which", rater, pair))[:count]
    places = {pair: place for place, pair in enumerate(pairs)}
    behind: dict[int, list[int]] = {}
    for pair in sorted(chosen):
        earliest = places[pair] + LEAST_GAP
        place = earliest + int(_chance("when", rater, pair) * (len(pairs) - earliest))
        behind.setdefault(place, []).append(pair)
    shown = []
    for place, pair in enumerate(pairs):
        shown.append(Showing(pair))
        shown += [Showing(again, is_repeat=True) for again in behind.get(place, [])]
    return shown


def due(shown: Iterable[Showing], choices: Iterable[Choice]) -> list[Due]:
    """Those that `choices` of one rater do not answer, in order; what was skipped does not come back."""
    taken_back: dict[Showing, int] = {}
    answered: set[Showing] = set()
    skipped: set[int] = set()
    for choice in choices:
        showing = Showing(choice.pair, choice.is_repeat)
        if choice.is_withdrawn:
            taken_back[showing] = taken_back.get(showing, 0) + 1
            continue
        answered.add(showing)
        if choice.choice == "skip":
            skipped.add(choice.pair)
    return [
        Due(showing, taken_back.get(showing, 0))
        for showing in shown
        if showing not in answered and not (showing.is_repeat and showing.pair in skipped)
    ]


def _chance(what: str, rater: str, pair: int) -> float:
    """A number in 0..1 that only depends on its arguments."""
    digest = hashlib.sha256(f"{what}\n{rater}\n{pair}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
