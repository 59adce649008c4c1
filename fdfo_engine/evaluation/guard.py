"""The guard: sees from a run's own logs that its reward is pleased at the expense of the images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from fdfo_engine.config import GuardConfig
from fdfo_engine.metrics import health_drift

Record = Mapping[str, Any]


def findings(evaluations: Sequence[Record], epochs: Sequence[Record], settings: GuardConfig) -> list[str]:
    """What is out of order at the last of `evaluations`, a sentence each; none unless the training reward climbs.

    Out of order are: a health measure outside `settings.bands` or further than `max_drift` from the first evaluation;
    the held-out reward, or a metric beside it, more than `reward_drop` standard errors below its best. "Climbs": the
    slope of the training reward over the epochs since the first evaluation is above 0.

    Args:
        evaluations: lines of evaluations.jsonl, the one to judge last.
        epochs: lines of metrics.jsonl; those after it are left out.
        settings: the guard's.
    """
    first, last = evaluations[0], evaluations[-1]
    rewards = [r.get("reward_mean") for r in epochs if first["epoch"] < r["epoch"] <= last["epoch"]]
    if not _slope([float(r) for r in rewards if _is_number(r)]) > 0:
        return []
    return [*health_findings(last, first, settings), *_falls(evaluations, settings.reward_drop)]


def health_findings(now: Record, base: Record, settings: GuardConfig) -> Iterator[str]:
    """Sentences on the health measures of `now` that left their band; both have `health` and `health_std` by name."""
    for name, mean in now["health"].items():
        before, spread = base["health"].get(name), base["health_std"].get(name)
        if not (_is_number(mean) and _is_number(before) and _is_number(spread)):
            continue
        if name in settings.bands:
            least, most = settings.bands[name]
            if not least <= mean <= most:
                yield f"{name} is {mean:.4g}, outside its band {least:g} to {most:g}"
            continue
        drift = health_drift(name, mean, before, spread)
        if abs(drift) > settings.max_drift:
            yield (
                f"{name} went from {before:.4g} to {mean:.4g}, {abs(drift):.1f} standard deviations of the reference "
                f"images (limit {settings.max_drift:g})"
            )


def out_of_order(evaluations: Sequence[Record]) -> int:
    """How many of the last evaluations in a row were out of order."""
    count = 0
    for record in reversed(evaluations):
        if not record.get("guard"):
            break
        count += 1
    return count


def last_in_order(evaluations: Sequence[Record]) -> int | None:
    """Epoch of the last evaluation that the guard saw in order, or None."""
    return next((int(r["epoch"]) for r in reversed(evaluations) if r.get("guard") == []), None)


def _falls(evaluations: Sequence[Record], limit: float) -> Iterator[str]:
    for name in ["held-out reward", *evaluations[-1]["metrics"]]:
        every = [_figure(record, name) for record in evaluations]
        figures = [figure for figure in every if figure is not None]
        if len(figures) < 2 or every[-1] is None:
            continue
        (best, best_error), (now, error) = max(figures), figures[-1]
        errors = math.hypot(best_error, error)
        if now < best - limit * errors:
            yield f"{name} fell from {best:.4g} to {now:.4g}, more than {limit:g} standard errors ({errors:.2g})"


def _figure(record: Record, name: str) -> tuple[float, float] | None:
    if name == "held-out reward":
        value, error = record.get("reward"), record.get("reward_stderr")
    else:
        value, error = record["metrics"].get(name), (record.get("metrics_stderr") or {}).get(name)
    return (float(value), float(error or 0.0)) if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[float]:
    """A mean over no image at all is NaN, and null in a log."""
    return isinstance(value, int | float) and math.isfinite(value)


def _slope(values: Sequence[float]) -> float:
    """Least-squares slope over equal steps; 0 with fewer than two values."""
    if len(values) < 2:
        return 0.0
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    steps = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (value - mean) for i, value in enumerate(values)) / steps
