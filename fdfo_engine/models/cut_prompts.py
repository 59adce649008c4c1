"""Prompts that are longer than what a text encoder reads: counted before they are encoded, from a cache or not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fdfo_engine.models.advice import without_advice
from fdfo_engine.models.flow_model import FlowModel, TokenLimit
from fdfo_engine.runtime.console import say, visible, warn

MOST_AT_ONCE = 100_000
"""A minute of a tokenizer's time."""
_SHOWN = 60


class CutPrompts:
    """Tells each prompt that `model` cuts once, with all that were looked at together in one line a text encoder."""

    def __init__(self, model: FlowModel) -> None:
        self._model = model
        self._seen: set[str] = set()

    def tell(self, prompts: Sequence[str]) -> None:
        """Looks at those of `prompts` that it has not seen yet; of very many at the first, as it then says."""
        if len(prompts) > MOST_AT_ONCE:
            say(f"the first {MOST_AT_ONCE} of {len(prompts)} prompts are counted in tokens, others as they are encoded")
        first = itertools.islice(prompts, MOST_AT_ONCE)
        fresh = [prompt for prompt in dict.fromkeys(first) if prompt not in self._seen]
        if not fresh:
            return
        self._seen.update(fresh)
        with without_advice():
            for limit in self._model.token_limits():
                if line := describe_cut(fresh, limit):
                    warn(line)


def describe_cut(prompts: Sequence[str], limit: TokenLimit) -> str | None:
    """How many of `prompts` are longer than `limit`, and the longest; None where none is."""
    counts = limit.count(prompts)
    cut = sum(count > limit.most for count in counts)
    if not cut:
        return None
    most, longest = max(zip(counts, prompts, strict=True), key=lambda pair: pair[0])
    start = visible(longest[:_SHOWN]) + ("..." if len(longest) > _SHOWN else "")
    return (
        f"{cut} of {len(prompts)} prompts are cut: {limit.reader} reads {limit.most} tokens{limit.hint}; "
        f"the longest has {most}: {start!r}"
    )
