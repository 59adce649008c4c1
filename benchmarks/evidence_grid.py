"""The 2 x 2 x 2 grid of `docs/EVIDENCE.md`: FDFO's three choices, each made as FDFO makes it or as AWM does."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence_axes import (
    Axis,
    Finals,
    common_reward,
    diversity_at,
    final_reward,
    is_beyond_spread,
    paired_differences,
)

Record = Mapping[str, Any]
Cell = tuple[str, ...]
"""One value of each choice, in the order of `CHOICES`."""


@dataclass(frozen=True)
class Choice:
    """One axis of the grid.

    Attributes:
        question: what is chosen.
        values: FDFO's, then the other, as settings name them.
    """

    question: str
    values: tuple[str, str]


CHOICES = (
    Choice("states that are trained on", ("own", "renoised")),
    Choice("direction", ("pair", "image")),
    Choice("pairing", ("one_noise", "two_noises")),
)
CELLS: tuple[Cell, ...] = tuple(itertools.product(*(choice.values for choice in CHOICES)))

HEAD = """## Which of FDFO's choices matter

All eight ways to make three choices, at FDFO's learning rate, each trained like the methods above. *States*: those that
the sampler went through (`own`), or the final image noised again (`renoised`). *Direction*: along the difference of
the pair's images (`pair`), or toward the image's own straight line (`image`). *Pairing*: both images from one initial
noise (`one_noise`), or from two. The first row is FDFO; `renoised, image, two_noises` is AWM's estimator, with FDFO's
loss and pairs instead of groups. Differences are those of the same seeds; bold where all of at least three agree.
"""

PRESET = """The last cell is `configs/shapes_fast.yaml`: on this miniature and this judge it learns more from as many
images than FDFO, for more evaluations; their diversity is not told apart. Whether it does on a real model nobody has
measured; the `sd35m_*` configs keep the paper's settings.
"""


def cell_name(cell: Cell) -> str:
    """The method that a cell is called by in the results."""
    return ", ".join(cell)


def by_seed(finals: Finals, cell: Cell) -> dict[int, float]:
    """Held-out reward at the end of a cell's trials."""
    return {record["seed"]: record["curve"][-1]["reward"] for record in finals.get(cell_name(cell), [])}


def main_effect(finals: Finals, axis: int) -> list[float]:
    """Of each seed that all cells have: mean reward of FDFO's four cells on `axis`, less the others'."""
    rewards = {cell: by_seed(finals, cell) for cell in CELLS}
    seeds = sorted(set.intersection(*(set(found) for found in rewards.values())))
    own = CHOICES[axis].values[0]
    return [
        statistics.fmean(rewards[cell][seed] for cell in CELLS if cell[axis] == own)
        - statistics.fmean(rewards[cell][seed] for cell in CELLS if cell[axis] != own)
        for seed in seeds
    ]


def grid_rows(finals: Finals, fdfo: Sequence[Record]) -> list[list[str]]:
    """One line a cell that has run: its choices, what became of it, and that against FDFO's runs of the same seeds."""
    rows = []
    for cell in CELLS:
        records = finals.get(cell_name(cell), [])
        if records:
            against = ["", ""] if cell == CELLS[0] else against_fdfo(records, fdfo)
            rows.append([*cell, str(len(records)), *_outcome(records), *against])
    return rows


def against_fdfo(records: Sequence[Record], fdfo: Sequence[Record]) -> list[str]:
    """Difference of the final reward, and of the diversity at the highest reward that both reach; seed by seed."""
    level = common_reward({"fdfo": fdfo, "cell": records})
    reward = Axis("reward", lambda record: record["curve"][-1]["reward"], True, 3)
    diversity = Axis("diversity", lambda record: diversity_at(record["curve"], level), True, 3)
    return [difference(paired_differences(axis, records, fdfo), axis.digits) for axis in (reward, diversity)]


def difference(values: Sequence[float], digits: int, rival: str = "") -> str:
    """Median, least and largest; bold where all of at least three seeds agree."""
    if not values:
        return "one of them never got there"
    middle, low, high = (f"{value:+.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    text = f"{middle} ({low} to {high})" if len(values) > 1 else middle
    text = f"**{text}**" if is_beyond_spread(values) else text
    return f"{text} {rival}".strip()


def _outcome(records: Sequence[Record]) -> list[str]:
    strict = statistics.median(record["curve"][-1]["strict"] for record in records)
    evaluations = statistics.median(record["evaluations"] for record in records)
    rewards = [record["curve"][-1]["reward"] for record in records]
    spread = f"{final_reward(records):.3f} ({min(rewards):.3f} to {max(rewards):.3f})"
    return [spread, f"{strict:.3f}", f"{evaluations:,.0f}"]


def effect_lines(finals: Finals) -> str:
    """What each choice does to the reward, over the four ways to make the other two."""
    lines = []
    for axis, choice in enumerate(CHOICES):
        effects = main_effect(finals, axis)
        own, other = choice.values
        spread = f"{statistics.median(effects):+.3f} ({min(effects):+.3f} to {max(effects):+.3f})"
        verdict = "beyond the spread" if is_beyond_spread(effects) else "not told apart"
        lines.append(f"- {choice.question}, `{own}` instead of `{other}`: {spread}, {verdict}")
    return "\n".join(lines)
