"""Sections that are one of several kinds, and the key in them that says which."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variants:
    """`tag` is the key that tells the kinds apart; `default` its value where it is not given."""

    tag: str
    default: str


VARIANTS = {"sampling.churn": Variants("schedule", "raw"), "algorithm": Variants("name", "fdfo")}
"""By the section's dotted name."""
