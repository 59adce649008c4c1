"""Writes `docs/EVIDENCE.md` from the files under `benchmarks/results/evidence`: `python -m benchmarks.evidence_page`.

No number on the page is typed by hand.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.evidence_trials import EPOCHS, METHODS, training_reward
from fdfo_engine.metrics import health_drift

PAGE = ROOT / "docs" / "EVIDENCE.md"
WANTED_SEEDS = 5
SHARE_OF_GAIN = 0.9

Record = Mapping[str, Any]

HEAD = """# FDFO beside earlier methods, on one engine

Written by `python -m benchmarks.evidence_page` from the files of
[benchmarks/results/evidence](../benchmarks/results/evidence); what the methods are, and where they differ from what
was published, is in [ALGORITHMS.md](ALGORITHMS.md). All on the bundled shapes miniature, whose judge is a program
that looks at pixels: evidence of how the methods learn, not of how SD3.5 looks.
"""

VARIANCE = """## Variance of the update, at the bundled base

The whole gradient, all trained items, batches of different prompts and noise; `scaled` is each weight's gradient over
its root mean square, as AdamW scales it, and `as it is` is dominated by few weights. Larger is better; in brackets 90 %
intervals. One that holds 0 means that these batches were too small or too few to show any agreement. What a method
agrees on need not be what raises the reward.
"""

METHOD = """## How it was measured

One engine, model, grid (8 steps, 4 of them trained), optimizer and reward for all; groups of 8 images for the methods
that use groups, equal images an epoch. Held-out: 64 captions that were never trained on, 4 seeds each, without churn,
of the raw weights. A network evaluation is one image at one step; a backward counts as two more. Learning rates are
chosen on training prompts, with as many trials for every method, by the mean training reward of the last ten epochs;
every trial that was run is listed. Seconds are those of one thread on a machine that other work shared: compare them
with care, evaluations are exact.

Of the variance: the scaled figure was added after a first look at the unscaled one of fdfo and flow_grpo, and 50
batches were asked of these two after the first ten; so far only fdfo's are all there. Intervals are over random halves
of the batches; with ten batches they are rough.

```bash
python -m benchmarks.variance                # agreement of batches; goes on where it was killed
python -m benchmarks.convergence             # tuning, five seeds, options; trial by trial, goes on where it was killed
python -m benchmarks.evidence_page           # this page
```
"""

NOT_MEASURED = """## Not measured

SD3.5-Medium or any other real model; a second task; DreamSim or Vendi diversity; the grid of states, direction and
pairing; antithetic noise, best-of-N branches of one noise, importance sampling and the true reward gradient (not
built); KL terms; the published batch sizes. Guidance is 1 throughout, which is none of the settings Flow-GRPO was
published with.
"""


def main() -> None:
    """Writes the page."""
    variance, convergence = (_read(name) for name in ("variance", "convergence"))
    trials = convergence.get("trials", {})
    parts = [
        HEAD,
        state(trials, variance),
        variance_table(variance),
        final_table(trials),
        METHOD,
        trial_list(trials),
        NOT_MEASURED,
    ]
    PAGE.write_text("\n".join(part for part in parts if part))


def state(trials: Mapping[str, Record], variance: Record) -> str:
    """What there is to judge by, said first."""
    seeds = {method: len(_finals(trials).get(method, [])) for method in METHODS}
    counted = ", ".join(f"{method} {count}" for method, count in seeds.items())
    lines = [f"Finished runs at frozen settings, of {WANTED_SEEDS} wanted a method: {counted}."]
    if min(seeds.values()) < WANTED_SEEDS:
        lines.append("That is too few to say which method converges faster or further, and this page does not say it.")
    methods = variance.get("methods", {})
    if "fdfo" in methods:
        verdicts = [f"{name}: {compared(methods['fdfo'], found)}" for name, found in methods.items() if name != "fdfo"]
        lines.append(f"Signal to noise of FDFO's update at equal images, against {'; '.join(verdicts)}.")
    return "\n".join(lines) + "\n"


def compared(fdfo: Record, other: Record) -> str:
    """Which signal-to-noise ratio is larger, if their intervals part."""
    (low, high), (other_low, other_high) = (
        found["scaled"]["signal_to_noise_interval_90"] for found in (fdfo, other)
    )  # fmt: skip
    if low > other_high:
        return "FDFO's is larger"
    return "FDFO's is smaller" if high < other_low else "not told apart"


def variance_table(variance: Record) -> str:
    """Agreement of independent batches at the bundled base."""
    methods = variance.get("methods", {})
    if not methods:
        return ""
    rows = [
        [
            method, str(found["images_a_batch"]), str(found["batches"]), _ranged(found["scaled"], "signal_to_noise"),
            _ranged(found["gradient"], "signal_to_noise"), _ranged(found["scaled"], "cosine"),
            f"{found['scaled']['cosine_with_the_others_mean']:.3f}", f"{found['median_seconds_a_batch']:.1f}",
        ]
        for method, found in methods.items()
    ]  # fmt: skip
    names = [
        "method", "images a batch", "batches", "signal to noise, scaled", "the same, as it is",
        "cosine of two batches, scaled", "cosine with the others' mean, scaled", "seconds a batch",
    ]  # fmt: skip
    return "\n".join([VARIANCE, _table(names, rows), ""])


def final_table(trials: Mapping[str, Record]) -> str:
    """Held-out reward, cost to get there, diversity, health."""
    finals = _finals(trials)
    if not finals:
        return ""
    ends = [record["curve"][-1]["reward"] for records in finals.values() for record in records]
    start = statistics.median(record["curve"][0]["reward"] for records in finals.values() for record in records)
    goal = start + SHARE_OF_GAIN * (max(ends) - start)
    names = [
        "method", "seeds", "held-out reward", "every fact right", "pixel diversity", f"images to {goal:.3f}",
        "evaluations to it", "seconds of training", "largest health drift", "velocity against the first epoch's",
    ]  # fmt: skip
    rows = [_final_row(method, records, goal) for method, records in finals.items()]
    way = f"{SHARE_OF_GAIN:.0%} of the way to the best final reward, interpolated"
    note = f"The base has {start:.3f}. `to {goal:.3f}`: {way}."
    return "\n".join([f"## Training, {EPOCHS} epochs of 48 images\n", note + "\n", _table(names, rows), ""])


def _final_row(method: str, records: Sequence[Record], goal: float) -> list[str]:
    last = [record["curve"][-1] for record in records]
    drifts = [drift(record["curve"]) for record in records]
    return [
        method,
        str(len(records)),
        _spread([point["reward"] for point in last]),
        _spread([point["strict"] for point in last]),
        _spread([point["diversity"]["pixel_diversity"] for point in last]),
        _reached([crossing(record["curve"], goal, "images") for record in records]),
        _reached([crossing(record["curve"], goal, "evaluations") for record in records]),
        _spread([point["seconds"] for point in last], digits=0),
        _spread(drifts, digits=2),
        _spread([statistics.fmean(point["velocity_ratio"]) for point in last]),
    ]


def crossing(curve: Sequence[Record], goal: float, axis: str) -> float | None:
    """Where the held-out reward first reaches `goal`, interpolated between evaluations; None if it never does."""
    for before, after in pairwise(curve):
        if after["reward"] >= goal > before["reward"]:
            share = (goal - before["reward"]) / (after["reward"] - before["reward"])
            return float(before[axis] + share * (after[axis] - before[axis]))
    return None


def drift(curve: Sequence[Record]) -> float:
    """The largest magnitude of a health measure's drift, in standard deviations over the base's images."""
    first, last = curve[0], curve[-1]
    moves = (
        health_drift(name, last["health"][name], first["health"][name], first["health_std"][name])
        for name in last["health"]
    )
    return max(map(abs, moves))


def trial_list(trials: Mapping[str, Record]) -> str:
    """Every trial that was finished."""
    if not trials:
        return ""
    rows = [
        [
            name, f"{training_reward(record):.4f}", f"{record['curve'][-1]['reward']:.4f}",
            f"{record['curve'][-1]['strict']:.3f}", f"{record['evaluations']:,}", f"{record['seconds']:.0f}",
        ]
        for name, record in trials.items()
    ]  # fmt: skip
    names = ["trial", "training reward, last epochs", "held-out reward", "every fact right", "evaluations", "seconds"]
    return "\n".join(["## Every trial\n", _table(names, rows), ""])


def _finals(trials: Mapping[str, Record]) -> dict[str, list[Record]]:
    """Runs at frozen settings, by method or option."""
    found = defaultdict(list)
    for record in trials.values():
        if record["stage"] != "tune":
            found[record["method"]].append(record)
    return dict(found)


def _read(name: str) -> Record:
    path = RESULTS / "evidence" / f"{name}.json"
    content: Record = json.loads(path.read_text()) if path.exists() else {}
    return content


def _ranged(found: Record, name: str) -> str:
    low, high = found[f"{name}_interval_90"]
    return f"{found[name]:.3f} ({low:.3f} to {high:.3f})"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _reached(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    share = "" if len(known) == len(values) else f" in {len(known)} of {len(values)}"
    return f"{statistics.median(known):,.0f}{share}" if known else "not reached"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
