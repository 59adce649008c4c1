"""Writes `docs/EVIDENCE.md` from the files under `benchmarks/results/evidence`: `python -m benchmarks.evidence_page`.

No number on the page is typed by hand.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT, evidence_plots
from benchmarks.evidence_axes import (
    SHARE_OF_GAIN,
    Axis,
    Finals,
    axes,
    base_reward,
    best_method,
    is_beyond_spread,
    paired_differences,
    reward_goal,
)
from benchmarks.evidence_grid import CELLS, PRESET, difference, effect_lines, grid_rows
from benchmarks.evidence_grid import HEAD as GRID
from benchmarks.evidence_tasks import TASKS, Task
from benchmarks.evidence_trials import training_reward
from benchmarks.evidence_words import (
    COUNTING,
    EFFECTS,
    HEAD,
    METHOD,
    NOT_MEASURED,
    OPTIONS,
    PUBLISHED,
    READY,
    VARIANCE,
)

PAGE = ROOT / "docs" / "EVIDENCE.md"
WANTED_SEEDS = 5

Record = Mapping[str, Any]


def main() -> None:
    """Writes the page and its pictures."""
    variance = _read(RESULTS / "evidence" / "variance.json")
    trials, counting, grid = (_read(TASKS[name].file).get("trials", {}) for name in ("shapes", "counting", "grid"))
    finals, changed = (_of_stage(trials, stage) for stage in ("final", "option"))
    parts = [
        HEAD,
        summary_table(finals, TASKS["shapes"]),
        state(finals, variance),
        draw(finals, changed),
        option_table(finals, changed),
        published_line(finals, changed),
        second_task(_of_stage(counting, "final")),
        grid_table(_by_method(grid, "final"), finals.get("fdfo", [])),
        variance_table(variance),
        METHOD,
        budget([*trials.values(), *counting.values(), *grid.values()]),
        READY,
        trial_list("Every trial, shapes", trials),
        trial_list("Every trial, counting", counting),
        trial_list("Every trial, grid", grid),
        NOT_MEASURED,
    ]
    PAGE.write_text("\n".join(part for part in parts if part))


def state(finals: Finals, variance: Record) -> str:
    """What there is to judge by, and what it says."""
    seeds = {method: len(finals.get(method, [])) for method in TASKS["shapes"].methods}
    counted = ", ".join(f"{method} {count}" for method, count in seeds.items())
    lines = [f"Finished runs at frozen settings, of {WANTED_SEEDS} wanted a method: {counted}."]
    if min(seeds.values()) < 3:
        lines.append("That is too few to say which method converges faster or further, and this page does not say it.")
    else:
        lines.append(verdict(finals))
    methods = variance.get("methods", {})
    if "fdfo" in methods:
        verdicts = [f"{name}: {compared(methods['fdfo'], found)}" for name, found in methods.items() if name != "fdfo"]
        lines.append(f"Signal to noise of FDFO's update at equal images, against {'; '.join(verdicts)}.")
    return "\n".join(lines) + "\n"


def verdict(finals: Finals) -> str:
    """Where FDFO loses, then where it wins, beyond the spread of the seeds."""
    lost, won, open_ = [], [], []
    for axis in axes(finals):
        for rival in (method for method in finals if method != "fdfo"):
            differences = paired_differences(axis, finals["fdfo"], finals[rival])
            is_better = bool(differences) and (differences[0] > 0) == axis.larger_is_better
            chosen = open_ if not is_beyond_spread(differences) else won if is_better else lost
            chosen.append((axis.name, rival))
    return f"\n- FDFO loses on: {_listed(lost)}.\n- It wins on: {_listed(won)}.\n- Not told apart: {_listed(open_)}.\n"


def _listed(found: Sequence[tuple[str, str]]) -> str:
    by_axis = defaultdict(list)
    for axis, rival in found:
        by_axis[axis].append(rival)
    return "; ".join(f"{axis} (against {', '.join(rivals)})" for axis, rivals in by_axis.items()) or "nothing"


def draw(finals: Finals, changed: Finals) -> str:
    """Writes the pictures beside the page; returns where they stand on it."""
    if "fdfo" not in finals:
        return ""
    evidence_plots.curves(finals, PAGE.with_name("evidence_curves.svg"))
    evidence_plots.diversity(finals, PAGE.with_name("evidence_diversity.svg"))
    if changed:
        evidence_plots.options(finals, changed, PAGE.with_name("evidence_options.svg"))
    return (
        "![held-out reward over images, evaluations and seconds](evidence_curves.svg)\n\n"
        "![diversity against reward](evidence_diversity.svg)\n"
    )


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


def summary_table(finals: Finals, task: Task) -> str:
    """Who is best on which axis, and how far FDFO is from it."""
    if "fdfo" not in finals:
        return ""
    rows = [_summary_row(axis, finals) for axis in axes(finals)]
    names = ["axis", *finals, "best", "FDFO against the best other, same seeds"]
    seeds = ", ".join(f"{method} {len(records)}" for method, records in finals.items())
    note = (
        f"Median of the seeds ({seeds}), least and largest in brackets, after {task.epochs} epochs of 48 images. The "
        f"base has a held-out reward of {base_reward(finals):.3f}; {reward_goal(finals):.3f} is {SHARE_OF_GAIN:.0%} of "
        "the way from it to the best final reward. Bold: all of at least three seeds differ the same way.\n"
    )
    return "\n".join(["## Who wins on which axis\n", _table(names, rows), "", note])


def _summary_row(axis: Axis, finals: Finals) -> list[str]:
    others = {method: records for method, records in finals.items() if method != "fdfo"}
    rival = best_method(axis, others)
    differences = paired_differences(axis, finals["fdfo"], others.get(rival, []))
    values = [_spread([axis.of(record) for record in records], axis.digits) for records in finals.values()]
    return [axis.name, *values, best_method(axis, finals), difference(differences, axis.digits, rival)]


def second_task(finals: Finals) -> str:
    """The same comparison on another reward."""
    table = summary_table(finals, TASKS["counting"])
    return f"{COUNTING}\n{table.split(chr(10), 2)[2]}" if table else ""


def grid_table(finals: Finals, fdfo: Sequence[Record]) -> str:
    """FDFO's three choices, each made both ways."""
    if not finals:
        return ""
    names = [
        "states", "direction", "pairing", "seeds", "held-out reward at the end", "every fact right", "evaluations",
        "reward against FDFO", "diversity against FDFO at equal reward",
    ]  # fmt: skip
    table = _table(names, grid_rows(finals, fdfo))
    if len(finals) < len(CELLS):
        return "\n".join([GRID, table, "", "The other cells have not run.\n"])
    return "\n".join([GRID, table, "", EFFECTS, effect_lines(finals), "", PRESET])


def option_table(finals: Finals, changed: Finals) -> str:
    """What each switch of FDFO changes, against FDFO of the same seeds."""
    if not changed or "fdfo" not in finals:
        return ""
    shown = [axis for axis in axes(finals) if not axis.name.startswith(("network", "velocity"))]
    rows = [
        [name.removeprefix("fdfo+"), str(len(records)), *(_effect(axis, records, finals["fdfo"]) for axis in shown)]
        for name, records in changed.items()
    ]
    names = ["option", "seeds", *(axis.name for axis in shown)]
    return "\n".join(
        [OPTIONS, options_verdict(finals, changed), _table(names, rows), "", "![options](evidence_options.svg)\n"]
    )


def options_verdict(finals: Finals, changed: Finals) -> str:
    """Which options raise or lower the final held-out reward beyond the spread of the seeds."""
    reward = axes(finals)[0]
    effects = {
        name.removeprefix("fdfo+"): paired_differences(reward, records, finals["fdfo"])
        for name, records in changed.items()
    }
    better = [name for name, values in effects.items() if is_beyond_spread(values) and values[0] > 0]
    worse = [name for name, values in effects.items() if is_beyond_spread(values) and values[0] < 0]
    return (
        f"Held-out reward at the end, on at least three seeds that all agree: raised by {', '.join(better) or 'none'}; "
        f"lowered by {', '.join(worse) or 'none'}.\n"
    )


def published_line(finals: Finals, changed: Finals) -> str:
    """What the miniature's own settings of the update are worth against those that FDFO was published with."""
    told = []
    shown = axes(finals)
    picked = [axis for axis in shown if axis.name.startswith(("held-out", "evaluations", "pixel diversity"))]
    for name in ("published_update", "published_update_lr6e-05"):
        records = changed.get(f"fdfo+{name}", [])
        if records:
            effects = "; ".join(f"{axis.name} {_effect(axis, finals['fdfo'], records)}" for axis in picked)
            told.append(f"- against `{name}`: {effects}")
    if not told:
        return ""
    return "\n".join([PUBLISHED, *told, ""])


def _effect(axis: Axis, records: Sequence[Record], fdfo: Sequence[Record]) -> str:
    return difference(paired_differences(axis, records, fdfo), axis.digits)


def budget(trials: Sequence[Record]) -> str:
    """How long all of it took."""
    hours = sum(record["seconds"] for record in trials) / 3600
    return (
        f"All {len(trials)} trials together: {hours:.1f} hours of training on one thread; evaluations are not in it.\n"
    )


def trial_list(title: str, trials: Mapping[str, Record]) -> str:
    """Every trial that was finished."""
    if not trials:
        return ""
    rows = [
        [
            name, f"{training_reward(record):.4f}", f"{record['curve'][-1]['reward']:.4f}",
            f"{record['evaluations']:,}", f"{record['seconds']:.0f}",
        ]
        for name, record in trials.items()
    ]  # fmt: skip
    names = ["trial", "training reward, last epochs", "held-out reward", "evaluations", "seconds"]
    return "\n".join([f"## {title}\n", _table(names, rows), ""])


def _by_method(trials: Mapping[str, Record], stage: str) -> Finals:
    """Finished runs of a stage by method, option or cell."""
    found = defaultdict(list)
    for record in trials.values():
        if record["stage"] == stage:
            found[record["method"]].append(record)
    return found


def _of_stage(trials: Mapping[str, Record], stage: str) -> Finals:
    """Finished runs of a stage by method or option, in the order in which they are declared."""
    found, task = _by_method(trials, stage), TASKS["shapes"]
    order = [*task.methods, *(f"fdfo+{option}" for option in task.options)]
    return {method: found[method] for method in order if method in found}


def _read(path: Path) -> Record:
    content: Record = json.loads(path.read_text()) if path.exists() else {}
    return content


def _ranged(found: Record, name: str) -> str:
    low, high = found[f"{name}_interval_90"]
    return f"{found[name]:.3f} ({low:.3f} to {high:.3f})"


def _spread(values: Sequence[float], digits: int) -> str:
    got_there = [value for value in values if math.isfinite(value)]
    if not got_there:
        return "not reached"
    middle = f"{statistics.median(got_there):,.{digits}f}"
    text = middle if len(got_there) == 1 else f"{middle} ({min(got_there):,.{digits}f} to {max(got_there):,.{digits}f})"
    return text if len(got_there) == len(values) else f"{text}, {len(got_there)} of {len(values)} seeds"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
