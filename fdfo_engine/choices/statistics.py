"""What a person's choices say, and how surely: shares with intervals, steadiness, haste, agreement."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fdfo_engine.choices.records import Choice, standing

HASTY_MS = 350
"""A person who answers faster has hardly looked."""
TIRED_WINDOW = 30
"""Pairs at a round's beginning, and at its end so far, whose ties are compared."""
STEADY_SHARE = 0.7
_STEADY_LEAST = 4
"""Repeats below which a share of equal answers says nothing."""


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with the Wilson score interval of the share; None where `total` is 0."""

    count: int
    total: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float | None:
        """The share itself."""
        return self.count / self.total if self.total else None


def wilson(count: int, total: int, confidence: float = 0.95) -> Share:
    """The share `count / total` with its Wilson score interval (Wilson 1927)."""
    if total == 0:
        return Share(0, 0, None, None)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return Share(count, total, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so uneven a split if both were equally likely; ties are left out before. 1 without any."""
    total, least = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, k) for k in range(least + 1))
    return min(1.0, 2 * tail / float(2**total))


def kappa(first: Sequence[object], second: Sequence[object]) -> float | None:
    """Cohen's kappa of two raters' answers to the same questions: `(p_o - p_e) / (1 - p_e)` (Cohen 1960).

    1 where both always agree, 0 where they agree as often as their shares of answers make by chance; None without
    common questions, or where both gave one and the same answer to all.
    """
    total = len(first)
    if total == 0:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    expected = sum(first.count(name) * second.count(name) for name in {*first, *second}) / total**2
    return (observed - expected) / (1 - expected) if expected < 1 else None


@dataclass(frozen=True)
class RaterSummary:
    """One rater's answers.

    Attributes:
        rater: the name.
        answers: first showings answered by left, right or tie. ties, skips: how many of each.
        left: share of left among left and right: far from a half, a person has a habit and not an opinion.
        steady: repeated pairs that got the same answer again.
        hasty: answers given in less than 350 ms.
        median_s: seconds an answer; None where none is known.
        flips, zooms: how often images were exchanged and enlarged.
    """

    rater: str
    answers: int
    ties: int
    skips: int
    left: Share
    steady: Share
    hasty: int
    median_s: float | None
    flips: int
    zooms: int


def summary(choices: Iterable[Choice], rater: str) -> RaterSummary:
    """What `rater` answered, over all of `choices`."""
    own = [choice for choice in choices if choice.rater == rater]
    first = standing(own)
    counts = Counter(choice.choice for choice in first)
    times = [choice.ms for choice in first if choice.ms is not None]
    return RaterSummary(
        rater=rater,
        answers=len(first) - counts["skip"],
        ties=counts["tie"],
        skips=counts["skip"],
        left=wilson(counts["left"], counts["left"] + counts["right"]),
        steady=steadiness(own),
        hasty=sum(ms < HASTY_MS for ms in times),
        median_s=statistics.median(times) / 1000 if times else None,
        flips=_total(choice.flips for choice in first),
        zooms=_total(choice.zooms for choice in first),
    )


def _total(counts: Iterable[int | None]) -> int:
    return sum(count or 0 for count in counts)


def steadiness(choices: Sequence[Choice]) -> Share:
    """Of the pairs that one rater answered twice, how many got the same answer, whichever side it was on."""
    first = {choice.pair: choice for choice in standing(choices) if choice.choice != "skip"}
    again = [choice for choice in standing(choices, repeats=True) if choice.choice != "skip" and choice.pair in first]
    return wilson(sum(choice.preferred == first[choice.pair].preferred for choice in again), len(again))


def hints_to_stop(choices: Sequence[Choice]) -> list[str]:
    """Why one rater might rather stop for now, by the answers of one round; empty while all is well."""
    hints = []
    ties = [choice.choice == "tie" for choice in standing(choices) if choice.choice != "skip"]
    if len(ties) >= 2 * TIRED_WINDOW:
        first, last = sum(ties[:TIRED_WINDOW]), sum(ties[-TIRED_WINDOW:])
        if last >= 2 * max(first, 1):
            hints.append(f"Of your last {TIRED_WINDOW} answers {last} were ties, of your first {TIRED_WINDOW} {first}.")
    steady = steadiness(choices)
    if steady.total >= _STEADY_LEAST and steady.count < STEADY_SHARE * steady.total:
        hints.append(f"You gave the same answer again to {steady.count} of {steady.total} repeated pairs.")
    return hints


def agreement(choices: Sequence[Choice]) -> list[tuple[str, str, int, float | None]]:
    """Of each two raters their names, the pairs that both answered, and Cohen's kappa over these."""
    by_rater: dict[str, dict[int, object]] = {}
    for choice in standing(choices):
        if choice.choice != "skip":
            by_rater.setdefault(choice.rater, {})[choice.pair] = choice.preferred
    found = []
    for one, other in itertools.combinations(sorted(by_rater), 2):
        common = sorted(by_rater[one].keys() & by_rater[other].keys())
        answers = [[by_rater[rater][pair] for pair in common] for rater in (one, other)]
        found.append((one, other, len(common), kappa(*answers)))
    return found


@dataclass(frozen=True)
class Comparison:
    """The blind comparison: pairs in which the trained model was preferred, the untrained one, or neither.

    Attributes:
        wins, losses, ties: of the trained model.
        rate: wins among wins and losses, with the Wilson interval.
        p: of the two-sided sign test.
    """

    wins: int
    losses: int
    ties: int

    @property
    def rate(self) -> Share:
        """Wins among wins and losses."""
        return wilson(self.wins, self.wins + self.losses)

    @property
    def p(self) -> float:
        """Of the two-sided sign test."""
        return sign_test(self.wins, self.losses)


def compared(choices: Iterable[Choice]) -> Comparison:
    """The result of one comparison; of several raters the majority of each pair counts."""
    balance: dict[int, int] = {}
    for choice in standing(choices):
        if choice.choice != "skip":
            step = 0 if choice.preferred is None else 2 * choice.preferred - 1
            balance[choice.pair] = balance.get(choice.pair, 0) + step
    wins = sum(value > 0 for value in balance.values())
    losses = sum(value < 0 for value in balance.values())
    return Comparison(wins, losses, len(balance) - wins - losses)
