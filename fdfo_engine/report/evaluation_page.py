"""An evaluation as a table in the terminal and as one HTML page that opens offline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fdfo_engine.report.curves import Series, line_chart, short, trade_off_chart
from fdfo_engine.report.page import render
from fdfo_engine.report.run_data import embedded
from fdfo_engine.runtime.console import visible
from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.errors import UsageError

RESULT_NAME, PAGE_NAME, PICTURES_NAME = "evaluation.json", "report.html", "pictures"
_MAX_SIDE = 256
_EXTREMES = 6


def write_evaluation_page(folder: Path) -> Path:
    """Writes `report.html` of the evaluation in `folder` (`evaluation.json`, `pictures/`) and returns its path.

    Raises:
        UsageError: no evaluation there.
        CheckpointError: the storage refuses.
    """
    file = folder / RESULT_NAME
    if not file.is_file():
        raise UsageError(f"{folder}: no evaluation; it has no {RESULT_NAME}")
    result = json.loads(file.read_bytes())
    replace_file(folder / PAGE_NAME, render("evaluation.html", _view(folder, result)))
    return folder / PAGE_NAME


def evaluation_table(result: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: a table for each set of weights, then what image health says."""
    lines = []
    for name in list(result["differences"]) or [result["sets"][0]["name"]]:
        rows = [[visible(row["name"]), *row["cells"]] for row in _rows(result, name)]
        lines += _aligned([["metric", *_head(result, name)], *rows])
        lines += [f"image health, {name}: {sentence}" for sentence in result["health_findings"].get(name, [])]
    return lines + _larger_health(result["larger"] or {})


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, its cells under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [map(str.ljust, row, widths) for row in rows]
    return ["  ".join(cells).rstrip() for cells in padded]


def _larger_health(larger: Mapping[str, Any]) -> list[str]:
    """What image health says of larger images."""
    size = f"image health at {larger.get('width')} x {larger.get('height')}"
    lines = [f"{size} was not measured: {visible(larger['note'])}"] if "note" in larger else []
    for name, sentences in (larger.get("health_findings") or {}).items():
        lines += [f"{size}, {name}: {sentence}" for sentence in sentences]
    return lines


def shown_prompts(result: Mapping[str, Any], count: int) -> list[int]:
    """Indices of prompts whose pictures are kept: the first `count`, and the winners and losers."""
    winners, losers = extremes(result)
    return sorted({*range(min(count, len(result["prompts"]))), *(winners + losers if count else ())})


def extremes(result: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Prompts whose first metric rose most and fell most from the base to the last set, at most six of each."""
    if not result["differences"]:
        return [], []
    metric, base, last = result["metrics"][0]["name"], result["sets"][0]["name"], result["sets"][-1]["name"]
    before, after = (_numbers(result["scores"][name][metric]) for name in (base, last))
    changes = [(b - a, i) for i, (a, b) in enumerate(zip(before, after, strict=True)) if math.isfinite(b - a)]
    winners = sorted((c for c in changes if c[0] > 0), key=lambda c: (-c[0], c[1]))
    losers = sorted(c for c in changes if c[0] < 0)
    return [i for _, i in winners[:_EXTREMES]], [i for _, i in losers[:_EXTREMES]]


def _view(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    names = [s["name"] for s in result["sets"]]
    winners, losers = extremes(result)
    shown = shown_prompts(result, result["pictures_shown"])
    larger = result["larger"]
    return {
        "title": f"{result['title']}: {' against '.join([names[0], *names[-1:]] if len(names) > 1 else names)}",
        "facts": _facts(result),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "confidence": f"{result['confidence']:.0%}",
        "tables": [_table(result, name) for name in [*reversed(result["differences"])] or names],
        "findings": [(n, s) for n, sentences in result["health_findings"].items() for s in sentences],
        "compares": len(names) > 1,
        "verdict": _verdict(result),
        "farthest": _farthest(result),
        "trade_offs": _trade_offs(result),
        "curves": _curves(result),
        "primary": result["metrics"][0]["name"] if result["metrics"] else "",
        "galleries": [
            ("Winners", _cards(folder, result, winners)),
            ("Losers", _cards(folder, result, losers)),
            ("Same prompt, same seed", _cards(folder, result, [i for i in shown if i < result["pictures_shown"]])),
        ],
        "larger": larger,
        "larger_table": _table(larger, larger["sets"][-1]["name"]) if larger and "sets" in larger else None,
    }


def _verdict(result: Mapping[str, Any]) -> str:
    """What became of the first metric, and which diversity clearly changed; empty without two sets."""
    if not result["differences"] or not result["metrics"]:
        return ""
    name, metric = result["sets"][-1]["name"], result["metrics"][0]["name"]
    difference = result["differences"][name][metric]
    if not difference["count"]:
        return f"{metric} was measured on no prompt."
    moved = {"good": "rose", "bad": "fell"}.get(_trend("reward", difference), "did not clearly change")
    shares = f"better on {difference['rose']:.0%} of the prompts, worse on {difference['fell']:.0%}"
    sentences = [f"{metric} {moved}: {_mean(difference, '+')}; {shares}."]
    for diversity in (m["name"] for m in result["metrics"] if m["kind"] == "diversity"):
        change = result["differences"][name][diversity]
        if trend := _trend("diversity", change):
            sentences.append(f"{diversity} {'rose' if trend == 'good' else 'fell'}: {_mean(change, '+')}.")
    return " ".join(sentences)


def _farthest(result: Mapping[str, Any]) -> str:
    """Which health measure moved most in any set, and how far; empty where none is known."""
    moved = [(_number(d), m, name) for name, drifts in result["health_drift"].items() for m, d in drifts.items()]
    known = [one for one in moved if math.isfinite(one[0])]
    if not known:
        return ""
    drift, metric, name = max(known, key=lambda one: abs(one[0]))
    return f"Farthest: {metric} at {name}, {drift:+.2f} standard deviations of the base's images."


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    request = result["request"]
    steps = request["steps"] if request["steps"] is not None else "the run's"
    return [
        ("Model", str(result["model"])), ("Size", f"{result['width']} x {result['height']}"),
        ("Prompts", str(request["prompts"])), ("Images a prompt", str(request["images_per_prompt"])),
        ("Seed", str(request["seed"])), ("Steps", str(steps)),
        ("Weights", ", ".join(f"{s['name']} ({s['weights']})" for s in result["sets"])),
    ]  # fmt: skip


def _table(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"name": name, "head": _head(result, name), "rows": _rows(result, name)}


def _head(result: Mapping[str, Any], name: str) -> list[str]:
    base = result["sets"][0]["name"]
    return [name] if name == base else [base, name, "difference", "bootstrap", "rose / fell"]


def _rows(result: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    base = result["sets"][0]["name"]
    rows = []
    for metric in result["metrics"]:
        own = result["summary"][name][metric["name"]]
        if name == base:
            rows.append({**metric, "cells": [_mean(own)], "trend": ""})
            continue
        difference = result["differences"][name][metric["name"]]
        bootstrap = _range(difference["bootstrap_low"], difference["bootstrap_high"])
        shares = f"{difference['rose']:.0%} / {difference['fell']:.0%}" if difference["count"] else "none"
        cells = [_mean(result["summary"][base][metric["name"]]), _mean(own), _mean(difference, "+"), bootstrap, shares]
        has_left = any(s.startswith(f"{metric['name']} ") for s in result["health_findings"].get(name, ()))
        rows.append({**metric, "cells": cells, "trend": "bad" if has_left else _trend(metric["kind"], difference)})
    return rows


def _mean(interval: Mapping[str, Any], sign: str = "") -> str:
    mean = _number(interval["mean"])
    return f"{mean:{sign}.4g} {_range(interval['low'], interval['high'])}".rstrip() if math.isfinite(mean) else "none"


def _range(low: Any, high: Any) -> str:
    low, high = _number(low), _number(high)
    return f"[{low:.3g}, {high:.3g}]" if math.isfinite(low) and math.isfinite(high) else ""


def _trend(kind: str, difference: Mapping[str, Any]) -> str:
    """Whether the interval leaves out 0, for metrics of which more is better."""
    low, high = _number(difference["low"]), _number(difference["high"])
    if kind == "health" or not (low > 0 or high < 0):
        return ""
    return "good" if low > 0 else "bad"


def _trade_offs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first reward against each diversity, a point for each set of weights."""
    reward = next((m["name"] for m in result["metrics"] if m["kind"] == "reward"), None)
    if reward is None or len(result["sets"]) < 2:
        return []
    charts = []
    for diversity in (m["name"] for m in result["metrics"] if m["kind"] == "diversity"):
        points = [(s["name"], _set_mean(result, s, reward), _set_mean(result, s, diversity)) for s in result["sets"]]
        svg = trade_off_chart(points, f"{diversity} against {reward}")
        if svg:
            note = f"right: more {reward}; up: more {diversity}"
            charts.append({"title": f"{reward} and {diversity}", "svg": Markup(svg), "legend": [], "note": note})
    return charts


def _curves(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each metric over the epochs, where there are more than two sets."""
    if len(result["sets"]) < 3:
        return []
    charts = []
    for metric in result["metrics"]:
        points = [(float(s["epoch"]), _set_mean(result, s, metric["name"])) for s in result["sets"]]
        errors = [result["summary"][s["name"]][metric["name"]]["stderr"] for s in result["sets"]]
        svg = line_chart([Series(metric["name"], points, errors)], metric["name"])
        if svg:
            charts.append({"title": metric["name"], "svg": Markup(svg), "legend": [], "note": "bars: standard error"})
    return charts


def _set_mean(result: Mapping[str, Any], measured: Mapping[str, Any], metric: str) -> float:
    return _number(result["summary"][measured["name"]][metric]["mean"])


def _cards(folder: Path, result: Mapping[str, Any], indices: Sequence[int]) -> list[dict[str, Any]]:
    rewards = [m["name"] for m in result["metrics"] if m["kind"] == "reward"]
    cards = []
    for index in indices:
        views = []
        for name in (s["name"] for s in result["sets"]):
            scores = [(reward, _picture_score(result, name, reward, index)) for reward in rewards]
            picture = embedded(folder / PICTURES_NAME / name / f"{index:05d}.png", _MAX_SIDE)
            views.append({"name": name, "picture": picture, "scores": scores})
        cards.append({"prompt": result["prompts"][index], "views": views})
    return cards


def _picture_score(result: Mapping[str, Any], name: str, reward: str, index: int) -> str:
    """The score of the picture that is shown; beside it the mean over the prompt's images, where there are several."""
    own, mean = (_score(result[scores][name][reward][index]) for scores in ("picture_scores", "scores"))
    images = result["request"]["images_per_prompt"]
    return f"{own} (mean of {images}: {mean})" if images > 1 else own


def _score(value: Any) -> str:
    return short(float(value)) if math.isfinite(_number(value)) else "none"


def _numbers(values: Sequence[Any]) -> list[float]:
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
