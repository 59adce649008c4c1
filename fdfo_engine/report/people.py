"""What people chose, for the report: raters, agreement, and the blind comparison that owners ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdfo_engine.choices import Choice, Comparison, RaterSummary, Share, agreement, compared, summary
from fdfo_engine.choices.store import has_choices, read_choices
from fdfo_engine.runtime.errors import CheckpointError


def choices_of(folder: Path) -> list[Choice]:
    """Every choice that the run's store holds; none where there is no store, or it cannot be read."""
    if not has_choices(folder):
        return []
    try:
        return [judged.choice for judged in read_choices(folder)]
    except CheckpointError:
        return []


def people_view(choices: Sequence[Choice]) -> dict[str, Any]:
    """The section's view; empty where nobody chose."""
    if not choices:
        return {}
    trained = [choice for choice in choices if not choice.is_comparison]
    names = sorted({choice.rater for choice in choices})
    rounds = {choice.round for choice in trained}
    return {
        "rounds": len(rounds),
        "raters": [_rater_row(summary(trained, name)) for name in names],
        "agreement": [
            f"{one} and {other} answered {pairs} of the same pairs: kappa {'unknown' if k is None else f'{k:.2f}'}"
            for one, other, pairs, k in agreement(trained)
        ],
        "comparisons": [comparison_sentence(result) for result in comparisons(choices)],
    }


def comparisons(choices: Sequence[Choice]) -> list[Comparison]:
    """Results of the blind comparisons, oldest first."""
    by_round: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.is_comparison:
            by_round.setdefault(choice.round, []).append(choice)
    return [compared(of_round) for of_round in by_round.values()]


def comparison_sentence(result: Comparison) -> str:
    """The result in words."""
    return (
        f"Blind, against the untrained model: {percent(result.rate)} of the choices went to the trained one "
        f"({result.wins} to {result.losses}, {result.ties} ties); sign test p = {result.p:.3g}."
    )


def percent(share: Share) -> str:
    """A share with its interval."""
    if share.value is None or share.low is None or share.high is None:
        return "none"
    return f"{100 * share.value:.0f}% (95%: {100 * share.low:.0f} to {100 * share.high:.0f}%)"


def _rater_row(told: RaterSummary) -> list[str]:
    seconds = "" if told.median_s is None else f"{told.median_s:.1f}"
    return [
        told.rater, str(told.answers), str(told.ties), str(told.skips), percent(told.left), percent(told.steady),
        str(told.hasty), seconds,
    ]  # fmt: skip
