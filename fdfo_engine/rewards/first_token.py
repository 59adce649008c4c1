"""What a server's log-probabilities say of an answer's first token: which of two answers it is, and how surely.

The rule is that of the local reward, which reads two logits: the difference of two log-probabilities is that of the
logits. What a server can get wrong on the way is looked for here, before a number is believed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fdfo_engine.rewards.json_server import NoOpinionError
from fdfo_engine.rewards.questions import QuestionOptions
from fdfo_engine.runtime.console import visible

_MOST_ABOVE_ZERO = 0.01  # of a log-probability: half precision rounds
_MOST_IN_ALL = 1.5  # of the probabilities together: some servers rescale, and go a little above 1
_FLOOR_MASS = 1e-3  # below it, equal values of both answers stand for "not listed" and measure nothing
_LARGEST_INT = 2**53  # larger ones need not fit a float
_SHOWN_TOKENS = 8


class Candidate(NamedTuple):
    """One of the likeliest tokens as a server gave it; nothing of it is checked yet."""

    token: Any
    logprob: Any
    code: Any = None
    """What tells it from another token of the same text: its bytes."""


class Leaning(NamedTuple):
    """What the first token says."""

    difference: float
    """Log-probability of the target less that of the contrast."""

    mass: float
    """Probability of both together."""


class LittleMassError(NoOpinionError):
    """The model answers something else. `mass` is the probability of both answers together."""

    def __init__(self, reason: str, shown: str, mass: float) -> None:
        super().__init__(reason, shown)
        self.mass = mass


def leaning(candidates: Sequence[Candidate], options: QuestionOptions) -> Leaning:
    """Reads the likeliest first tokens.

    An answer is every token of exactly its text: "yes" and " Yes" are other tokens than "Yes", as they are to the local
    reward. Byte-level vocabularies have several tokens that print alike: their probabilities are added up, and a token
    that is listed twice counts once. What the server says of other tokens may be missing.

    Raises:
        NoOpinionError: an answer is not among them or has no number, or the numbers are no log-probabilities.
        LittleMassError: both answers together hold less than `options.least_mass` of the probability.
    """
    wanted = (options.target, options.contrast)
    _require_listed(wanted, candidates)
    numbers = _numbers(candidates)
    for text in wanted:
        if text not in numbers:
            given = next(candidate.logprob for candidate in candidates if candidate.token == text)
            raise NoOpinionError(f"no log-probabilities of {text!r}", f"it is {_shown(given)}")
    _require_probabilities([number for own in numbers.values() for number in own])
    target, contrast = (_log_of_sum(numbers[text]) for text in wanted)
    mass = math.exp(target) + math.exp(contrast)
    if target == contrast and mass < _FLOOR_MASS:
        raise LittleMassError(
            f"both answers are at {target:g}, which says that they are unlikely and no more", "", mass
        )
    if mass < options.least_mass:
        likeliest = max(numbers, key=lambda text: max(numbers[text]))
        reason = f"{' and '.join(map(repr, wanted))} hold less than least_mass of the first token's probability"
        raise LittleMassError(reason, f"{mass:.1g}; the likeliest is {visible(repr(likeliest))}", mass)
    return Leaning(target - contrast, mass)


def _require_listed(wanted: Sequence[str], candidates: Sequence[Candidate]) -> None:
    tokens = [candidate.token for candidate in candidates]
    missing = " and ".join(repr(text) for text in wanted if text not in tokens)
    if missing:
        shown = visible(", ".join(map(repr, tokens[:_SHOWN_TOKENS])))
        raise NoOpinionError(f"{missing} not among the answer's tokens", shown)


def _numbers(candidates: Sequence[Candidate]) -> dict[str, list[float]]:
    """Log-probabilities by text, each different token once; tokens without a number are left out."""
    listed = [(one.token, float(one.logprob), str(one.code)) for one in candidates if _is_number(one)]
    numbers: dict[str, list[float]] = {}
    for token, logprob, _ in dict.fromkeys(listed):
        numbers.setdefault(token, []).append(logprob)
    return numbers


def _is_number(candidate: Candidate) -> bool:
    value = candidate.logprob
    is_int = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_INT
    return isinstance(candidate.token, str) and (is_int or isinstance(value, float))


def _require_probabilities(logprobs: Sequence[float]) -> None:
    largest = max(logprobs)
    if largest > _MOST_ABOVE_ZERO:
        reason = "logits or probabilities where log-probabilities belong, which are at most 0"
        raise NoOpinionError(f"{reason} (vLLM: --logprobs-mode raw_logprobs)", f"{largest:g}")
    if (total := math.fsum(map(math.exp, logprobs))) > _MOST_IN_ALL:
        raise NoOpinionError("no log-probabilities: as such they add up to a probability above 1", f"{total:.3g}")


def _log_of_sum(logprobs: Sequence[float]) -> float:
    largest = max(logprobs)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(logprob - largest) for logprob in logprobs))


def _shown(value: Any) -> str:
    return "null" if value is None else visible(repr(value)[:40])
