"""The report: charts, pictures and numbers of a run in one HTML file that opens offline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fdfo_engine.config import HEALTH_MEASURES, GuardConfig
from fdfo_engine.metrics import health_drift
from fdfo_engine.report.curves import Point, Series, line_chart, short, smoothed, stacked_chart
from fdfo_engine.report.held_out import held_out_change
from fdfo_engine.report.people import people_view
from fdfo_engine.report.run_data import Gallery, RunData, read_run
from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.terminal import duration

REPORT_NAME = "report.html"
PHASES = ("rollout", "reward", "update")
_OPTIMISER = {
    "log_ratio_mean": "Mean log-ratio",
    "log_ratio_floor": "Log-ratio floor (on-policy)",
    "clip_fraction": "Clipped fraction",
    "grad_norm": "Gradient norm",
    "loss": "Loss",
    "kl": "KL term",
    "advantage_abs_mean": "Mean |advantage|",
    "lr": "Learning rate",
    "skipped_steps": "Skipped optimiser steps",
    "weights_changed": "Weights changed (1: yes)",
}
_NO_OPINION = {"tied_pairs": "tied", "lost_pairs": "lost opinion", "zero_direction_pairs": "identical latents"}
_RECENT_EPOCHS = 5


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes one HTML page about the run in `run_dir` and returns its path.

    The page needs nothing else: pictures are embedded, curves are inline SVG, and its policy forbids every outside
    resource. It can be written while the run goes on, or after it failed; what is missing is said on it.

    Args:
        run_dir: a run folder.
        out: the file to write, replaced atomically; `report.html` in the run folder by default.

    Raises:
        UsageError: `run_dir` is no run folder.
        CheckpointError: the file cannot be written.
    """
    data = read_run(Path(run_dir))
    out = Path(out) if out is not None else data.path / REPORT_NAME
    replace_file(out, render("template.html", _view(data)))
    return out


def render(template: str, view: Mapping[str, Any]) -> bytes:
    """A page of this folder's `template`; every text of the view is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return templates.get_template(template).render(view).encode("utf-8", "replace")


def _view(data: RunData) -> dict[str, Any]:
    return {
        "title": data.path.resolve().name,
        "facts": _facts(data),
        "status": _status(data),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tiles": _tiles(data),
        "verdict": _verdict(data.evaluations),
        "people": people_view(data.choices),
        "missing": data.missing,
        "rewards": _reward_charts(data.metrics),
        "evaluations": _evaluation_charts(data.evaluations),
        "changes": _changes(data.evaluations),
        "health": _health_charts(data),
        "guard": _guard_findings(data.evaluations),
        "gallery": _comparison(data.galleries),
        "gallery_epochs": [gallery.epoch for gallery in data.galleries],
        "pairs": data.pairs,
        "timings": _timing_charts(data.metrics),
        "optimiser": _optimiser_charts(data.metrics),
        "constants": _constants(data.metrics),
        "environment": _environment(data.environment or {}),
        "config_text": data.config_text,
    }


def _facts(data: RunData) -> list[tuple[str, str]]:
    """What distinguishes the run, from its settings."""
    keys = {
        "Model": "model.id", "Trained": "model.train", "Size": None, "Prompts": "prompts.source", "Seed": "run.seed",
        "Pairs an epoch": "sampling.pairs_per_epoch", "Steps": "sampling.steps", "Rewards": None,
        "Learning rate": "optimizer.lr",
    }  # fmt: skip
    special = {"Size": _size(data.settings), "Rewards": _rewards(data.settings)}
    facts = [(name, _setting(data.settings, key) if key else special[name]) for name, key in keys.items()]
    return [(name, str(value)) for name, value in facts if value is not None]


def _setting(settings: Mapping[str, Any], dotted: str) -> Any:
    value: Any = settings
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _size(settings: Mapping[str, Any]) -> str | None:
    height, width = _setting(settings, "model.height"), _setting(settings, "model.width")
    return f"{width} x {height}" if height and width else None


def _rewards(settings: Mapping[str, Any]) -> str | None:
    terms = settings.get("rewards")
    if not isinstance(terms, list):
        return None
    return ", ".join(f"{t.get('name')} x {t.get('weight', 1)}" for t in terms if isinstance(t, Mapping)) or None


def _status(data: RunData) -> dict[str, str]:
    status = data.status or {}
    state = str(status.get("state", "unknown"))
    if state == "died":
        message = "The process is gone without a word; the same command resumes from the last checkpoint."
    else:
        message = str(status.get("message") or "")
    code = status.get("exit_code")
    return {"state": state, "message": message, "code": "" if code in (None, 0) else f"exit code {code}"}


def _tiles(data: RunData) -> list[tuple[str, str, str]]:
    """Headline numbers: name, value, remark."""
    tiles = []
    if held_out := held_out_change(data.evaluations):
        tiles.append(("Held-out reward", held_out.headline, held_out.remark))
    if data.best:
        tiles.append(
            ("Best checkpoint", data.best.name, f"held-out reward {data.best.reward:.4g}; kept beside the newest")
        )
    if data.metrics:
        planned = _setting(data.settings, "run.epochs")
        tiles.append(("Epochs", str(data.metrics[-1]["epoch"]), f"of {planned}" if planned else ""))
    if reward := _values(data.metrics, "reward_mean"):
        tiles.append(_training_tile(reward))
    if seconds := _values(data.metrics, "seconds_total"):
        remark = f"{duration(sum(seconds) / len(seconds))} an epoch"
        tiles.append(("Time", duration(sum(seconds)), remark))
    if rates := sorted(_values(data.metrics, "images_per_second")):
        tiles.append(("Images a second", short(rates[len(rates) // 2]), "median"))
    return tiles


def _training_tile(reward: Sequence[float]) -> tuple[str, str, str]:
    """The mean of the last epochs against that of the first: as many each, and none of them in both."""
    count = min(_RECENT_EPOCHS, len(reward) // 2)
    if not count:
        return ("Training reward", short(reward[0]), "one epoch")
    before, after = sum(reward[:count]) / count, sum(reward[-count:]) / count
    of = f"means of {count} epochs" if count > 1 else "first and last epoch"
    return ("Training reward", short(after), f"{after - before:+.4g} from {short(before)}; {of}")


def _verdict(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on what the run has reached; empty before there are two evaluations."""
    held_out = held_out_change(evaluations)
    return held_out.sentence if held_out else ""


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return [(float(r["epoch"]), _number(r[key])) for r in records if key in r]


def _values(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [y for _, y in _points(records, key) if math.isfinite(y)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _chart(title: str, series: Sequence[Series], note: str = "") -> list[dict[str, Any]]:
    """A chart in a list, or an empty list where there is nothing to draw."""
    svg = line_chart(series, title)
    if svg is None:
        return []
    legend = [(s.name, s.color) for s in series if not s.faint]
    return [{"title": title, "svg": Markup(svg), "legend": legend if len(legend) > 1 else [], "note": note}]


def _reward_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = {key for record in metrics for key in record if key.startswith("reward_") and key.endswith("_mean")}
    names = {key: key.removeprefix("reward_").removesuffix("_mean") for key in sorted(keys - {"reward_mean"})}
    if len(names) == 1:  # the sum is that reward, times its weight
        return _reward_chart(next(iter(names.values())), metrics, "reward_mean")
    charts = _reward_chart("Reward (weighted sum)", metrics, "reward_mean")
    for key, name in names.items():
        charts += _reward_chart(name, metrics, key)
    return charts


def _reward_chart(title: str, metrics: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    points = _points(metrics, key)
    curves = [Series("each epoch", points, faint=True), Series("smoothed", smoothed(points))]
    return _chart(title, curves, "thin: each epoch; bold: trailing mean")


def _evaluation_charts(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    for metric in _metric_names(evaluations):
        series = [
            _evaluation_series(metric, weights, color, evaluations)
            for color, weights in enumerate(sorted({str(e.get("weights")) for e in evaluations}))
        ]
        charts += _chart(metric, [s for s in series if s.points], "bars: standard error")
    return charts


def _evaluation_series(metric: str, weights: str, color: int, evaluations: Sequence[Mapping[str, Any]]) -> Series:
    own = [e for e in evaluations if str(e.get("weights")) == weights and metric in e["metrics"]]
    errors = [(e.get("metrics_stderr") or {}).get(metric) for e in own]
    return Series(weights, [(float(e["epoch"]), _number(e["metrics"][metric])) for e in own], errors, color=color)


def _metric_names(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for evaluation in evaluations for name in evaluation["metrics"]))


def _health_charts(data: RunData) -> list[dict[str, Any]]:
    """All measures in one chart: how far each has moved, in the unit in which the guard counts, and its limit."""
    measured = [e for e in data.evaluations if e.get("health")]
    if not measured:
        return []
    series = []
    for color, name in enumerate(name for name in HEALTH_MEASURES if name in measured[0]["health"]):
        series.append(Series(name, [(float(e["epoch"]), _drift(name, e, measured[0])) for e in measured], color=color))
    limit = _number(_setting(data.settings, "evaluation.guard.max_drift") or GuardConfig().max_drift)
    ends = (float(measured[0]["epoch"]), float(measured[-1]["epoch"]))
    bounds = [Series("limit", [(end, bound) for end in ends], faint=True, color=5) for bound in (-limit, limit)]
    return _chart(
        "Drift since the first evaluation",
        [*series, *bounds],
        f"in standard deviations over the first images; thin: ±{limit:g}, where the guard would speak",
    )


def _drift(name: str, evaluation: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    mean, before = _number(evaluation["health"].get(name)), _number(first["health"].get(name))
    spread = _number((first.get("health_std") or {}).get(name))
    return health_drift(name, mean, before, spread)


def _guard_findings(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    return [(int(e["epoch"]), str(sentence)) for e in evaluations for sentence in e.get("guard") or []]


def _changes(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each metric and set of weights: at the first evaluation, at the last, and the difference."""
    rows = []
    for metric in _metric_names(evaluations):
        for weights in sorted({str(e.get("weights")) for e in evaluations}):
            series = _evaluation_series(metric, weights, 0, evaluations)
            if len(series.points) > 1:
                rows.append(_change(metric, series))
    return rows


def _change(metric: str, series: Series) -> dict[str, str]:
    (first, before), (last, after) = series.points[0], series.points[-1]
    errors = [series.errors[0], series.errors[-1]]
    spread = [f" ±{e:.2g}" if e else "" for e in errors]
    return {
        "metric": metric,
        "weights": series.name,
        "before": f"{short(before)}{spread[0]}",
        "after": f"{short(after)}{spread[1]}",
        "change": f"{after - before:+.4g}",
        "epochs": f"{first:.0f} → {last:.0f}",
    }


def _comparison(galleries: Sequence[Gallery]) -> list[dict[str, Any]]:
    """One card a prompt, with its picture at each kept evaluation; only where the prompt is the same in all."""
    cards = []
    for items in zip(*(gallery.items for gallery in galleries), strict=False):
        if len({item["prompt"] for item in items}) == 1:
            views = [
                {"name": f"epoch {g.epoch}", "picture": item["picture"], "scores": _scores(item["scores"])}
                for g, item in zip(galleries, items, strict=True)
            ]
            cards.append({"prompt": items[0]["prompt"], "views": views})
    return cards


def _scores(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, short(_number(value)) if _number(value) == _number(value) else "none") for name, value in scores.items()
    ]


def _timing_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = [*PHASES, "other"]
    rows = [(int(r["epoch"]), _phase_seconds(r)) for r in metrics if "seconds_total" in r]
    svg = stacked_chart(names, rows, "Seconds an epoch by phase")
    legend = [(name, color) for color, name in enumerate(names)]
    stacked = {"title": "Seconds an epoch", "svg": Markup(svg or ""), "legend": legend, "note": ""}
    rate = _chart("Images a second", [Series("images a second", _points(metrics, "images_per_second"))])
    return ([stacked] if svg else []) + rate


def _phase_seconds(record: Mapping[str, Any]) -> list[float]:
    known = [max(0.0, _number(record.get(f"seconds_{phase}", 0))) for phase in PHASES]
    known = [value if math.isfinite(value) else 0.0 for value in known]
    total = _number(record["seconds_total"])
    return [*known, max(0.0, total - sum(known)) if math.isfinite(total) else 0.0]


def _optimiser_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    pairs = []
    for color, (key, name) in enumerate(_NO_OPINION.items()):
        points = _points(metrics, key)
        if points and _constant(metrics, key) is None:
            pairs.append(Series(name, points, color=color))
    charts = _chart("Pairs without an opinion", pairs)
    for key, title in _OPTIMISER.items():
        if _constant(metrics, key) is None:
            charts += _chart(title, [Series(title, _points(metrics, key))])
    return charts


def _constants(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What never changed, with its value: no chart is needed for that."""
    titles = _OPTIMISER | {key: f"{name} pairs" for key, name in _NO_OPINION.items()}
    found = [(title, _constant(metrics, key)) for key, title in titles.items()]
    return ", ".join(f"{title} {short(value)}" for title, value in found if value is not None)


def _constant(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The value that every one of several epochs has; None where they differ, or there are too few to say."""
    values = _values(metrics, key)
    return values[0] if len(values) > 1 and min(values) == max(values) else None


def _environment(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, str(found[key])) for key in ("python", "platform", "host") if key in found]
    rows += [(name, str(version or "absent")) for name, version in (found.get("packages") or {}).items()]
    for device in found.get("devices") or []:
        rows.append(("GPU", f"{device.get('name')}, {device.get('memory_gib')} GiB"))
    if cpu := found.get("cpu"):
        flags = ", ".join(map(str, cpu.get("flags") or []))
        rows.append(("CPU", f"{cpu.get('name')}, {cpu.get('cores')} cores" + (f" ({flags})" if flags else "")))
    return rows
