"""What a trial of the evidence benchmarks is judged by, one number an axis, and what two methods' numbers say."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fdfo_engine.metrics import health_drift

SHARE_OF_GAIN = 0.9
NEVER = math.inf
NOBODY = "none"

Record = Mapping[str, Any]
Finals = Mapping[str, Sequence[Record]]
"""Trials at frozen settings by method, in the order of the methods; each has its `seed` and `curve`."""


@dataclass(frozen=True)
class Axis:
    """A number of a trial; `NEVER` where it does not get there."""

    name: str
    of: Callable[[Record], float]
    larger_is_better: bool
    digits: int


def axes(finals: Finals) -> list[Axis]:
    """What the methods are compared by; goals come from their own rewards."""
    goal, level, own = reward_goal(finals), common_reward(finals), final_reward(finals["fdfo"])

    def last(record: Record) -> Record:
        point: Record = record["curve"][-1]
        return point

    return [
        Axis("held-out reward at the end", lambda r: last(r)["reward"], True, 3),
        *_others(finals),
        Axis("evaluations in all, at equal images", lambda r: r["evaluations"], False, 0),
        Axis(f"images to {own:.3f}, where FDFO ends", lambda r: reached(r["curve"], own, "images"), False, 0),
        Axis(f"images to a reward of {goal:.3f}", lambda r: reached(r["curve"], goal, "images"), False, 0),
        Axis(f"network evaluations to {goal:.3f}", lambda r: reached(r["curve"], goal, "evaluations"), False, 0),
        Axis(f"seconds of training to {goal:.3f}", lambda r: reached(r["curve"], goal, "seconds"), False, 0),
        Axis(f"pixel diversity at a reward of {level:.3f}", lambda r: diversity_at(r["curve"], level), True, 3),
        Axis("largest drift of a health measure", lambda r: drift(r["curve"]), False, 2),
        Axis(
            "velocity against the first epoch's, distance of the ratio from 1",
            lambda r: abs(statistics.fmean(last(r)["velocity_ratio"]) - 1),
            False,
            3,
        ),
    ]


def _others(finals: Finals) -> list[Axis]:
    """Other rewards that were measured beside the task's own."""
    names = {"strict": "every fact right, share of images", "shapes": "share of facts right, not trained on"}
    some = next(iter(finals.values()))[0]["curve"][-1]
    return [Axis(words, functools.partial(_last, name=name), True, 3) for name, words in names.items() if name in some]


def _last(record: Record, name: str) -> float:
    value: float = record["curve"][-1][name]
    return value


def reward_goal(finals: Finals) -> float:
    """`SHARE_OF_GAIN` of the way from the base's reward to the best method's final one."""
    start = base_reward(finals)
    return start + SHARE_OF_GAIN * (max(map(final_reward, finals.values())) - start)


def final_reward(records: Sequence[Record]) -> float:
    """Held-out reward at the end, median of the seeds."""
    return statistics.median(record["curve"][-1]["reward"] for record in records)


def common_reward(finals: Finals) -> float:
    """The highest reward that the median trial of every method ends at or above."""
    return min(map(final_reward, finals.values()))


def base_reward(finals: Finals) -> float:
    """Held-out reward before training."""
    return statistics.median(record["curve"][0]["reward"] for records in finals.values() for record in records)


def reached(curve: Sequence[Record], goal: float, axis: str) -> float:
    """Where the held-out reward first reaches `goal`, interpolated between evaluations."""
    return _at_reward(curve, goal, lambda point: point[axis])


def diversity_at(curve: Sequence[Record], level: float) -> float:
    """Pixel diversity where the held-out reward first reaches `level`; `-NEVER` where it does not."""
    found = _at_reward(curve, level, lambda point: point["diversity"]["pixel_diversity"])
    return -NEVER if found == NEVER else found


def _at_reward(curve: Sequence[Record], goal: float, value: Callable[[Record], float]) -> float:
    for before, after in pairwise(curve):
        if after["reward"] >= goal > before["reward"]:
            share = (goal - before["reward"]) / (after["reward"] - before["reward"])
            return value(before) + share * (value(after) - value(before))
    return NEVER


def drift(curve: Sequence[Record]) -> float:
    """The largest magnitude of a health measure's drift, in standard deviations over the base's images."""
    first, last = curve[0], curve[-1]
    moves = (
        health_drift(name, last["health"][name], first["health"][name], first["health_std"][name])
        for name in last["health"]
    )
    return max(map(abs, moves))


def best_method(axis: Axis, finals: Finals) -> str:
    """Whose median is best; "none" where at most one seed in two of any method gets there."""
    medians = {method: statistics.median(map(axis.of, records)) for method, records in finals.items()}
    best = (max if axis.larger_is_better else min)(medians, key=medians.__getitem__)
    return best if math.isfinite(medians[best]) else NOBODY


def paired_differences(axis: Axis, one: Sequence[Record], other: Sequence[Record]) -> list[float]:
    """`one` minus `other` of each seed that both have, where both got there."""
    theirs = {record["seed"]: axis.of(record) for record in other}
    pairs = [(axis.of(record), theirs[record["seed"]]) for record in one if record["seed"] in theirs]
    return [mine - its for mine, its in pairs if math.isfinite(mine) and math.isfinite(its)]


def is_beyond_spread(differences: Sequence[float]) -> bool:
    """Whether at least three seeds all differ in the same direction."""
    return len(differences) >= 3 and (min(differences) > 0 or max(differences) < 0)
