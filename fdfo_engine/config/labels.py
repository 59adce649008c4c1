"""How a person is asked at the page of `fdfo label`."""

from typing import Annotated, Literal

from pydantic import Field

from fdfo_engine.config.section import Section


class KeepConfig(Section):
    """Samples more pairs than a round shows."""

    of: int = Field(default=2, ge=1, le=16)
    """Pairs sampled for each one that is shown; 1 shows every pair."""

    by: Literal["distance"] = "distance"
    """Of a prompt's pairs the one whose two latents ended furthest apart is shown: the one easiest to tell apart."""


class LabelsConfig(Section):
    """How a person is asked at the page of `fdfo label`."""

    question: Annotated[str, Field(min_length=1, max_length=300)] = "Which image is better?"
    """What the person is asked, in the owner's words; always on screen."""

    tie: Annotated[str, Field(min_length=1, max_length=300)] = "I would be equally happy with either."
    """What it means to choose neither."""

    round_size: int = Field(default=48, ge=1, le=1024)
    """Pairs that a round shows, then it trains; the page can train earlier."""

    keep: KeepConfig = KeepConfig()
    """Shows the pairs that differ most."""

    scale: Literal["none", "distance"] = "none"
    """distance multiplies the advantage of a choice by min(1, distance / the round's median distance)."""

    repeats: float = Field(default=0.05, ge=0, le=0.5)
    """Share of a round's pairs that come back with left and right swapped, to see how steady the answers are."""

    comparison: int = Field(default=50, ge=1, le=1024)
    """Pairs of the blind comparison of the untrained model with the trained one."""

    strip: int = Field(default=3, ge=0, le=16)
    """Images of fixed prompts and seeds drawn after each round, so that one sees the model move."""
