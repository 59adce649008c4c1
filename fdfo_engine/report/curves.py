"""Charts as inline SVG: no script, no font, no colour but the page's own (`--series-0` ...)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 28
_MAX_POINTS = 600
_MAX_BARS = 100
_MARKED_POINTS = 40
_LABEL_WIDTH, _LABEL_HEIGHT = 80, 11
_EPOCH = f'<text x="4" y="{HEIGHT - 10}">epoch</text>'

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve: `points` (epoch, value), sorted; a value that is not finite is a gap.

    Attributes:
        errors: standard errors of the points, drawn as bars, or empty.
        faint: drawn thin and pale, as the raw values behind a smoothed curve.
        color: number of its colour.
    """

    name: str
    points: Sequence[Point]
    errors: Sequence[float | None] = ()
    faint: bool = False
    color: int = 0


def line_chart(series: Sequence[Series], label: str) -> str | None:
    """SVG of curves over the epoch, or None if there is no finite value.

    Screen readers read out `label`, and of each curve where it begins, where it ends and between what it lies.
    """
    values = [y + s * e for c in series for (_, y), e in _with_errors(c) for s in (-1, 1) if math.isfinite(y)]
    if not values:
        return None
    xs = [x for curve in series for x, _ in curve.points]
    low, high = _padded(min(values), max(values))
    axes = _Axes(min(xs), max(xs), low if _has_negative(series) else max(low, 0.0), high)
    return _svg(label, [_in_words(series), axes.grid(), _EPOCH, *(_curve(axes, curve) for curve in series)])


def _in_words(series: Sequence[Series]) -> str:
    sentences = []
    for curve in series:
        known = [(x, y) for x, y in curve.points if math.isfinite(y)]
        if known and not curve.faint:
            (first, before), (last, after) = known[0], known[-1]
            values = [y for _, y in known]
            sentences.append(
                f"{curve.name}: {short(before)} at epoch {short(first)}, {short(after)} at epoch {short(last)}, "
                f"between {short(min(values))} and {short(max(values))}."
            )
    return f"<desc>{escape(' '.join(sentences))}</desc>"


def _has_negative(series: Sequence[Series]) -> bool:
    """Shares and counts have none, and then no negative part of an axis either, whatever their error bars reach."""
    return any(y < 0 for curve in series for _, y in curve.points if math.isfinite(y))


def stacked_chart(names: Sequence[str], rows: Sequence[tuple[int, Sequence[float]]], label: str) -> str | None:
    """SVG of stacked bars, one an epoch (or the mean of several next to each other); None without rows."""
    if not rows:
        return None
    rows = _bucketed_rows(rows)
    top = max(sum(values) for _, values in rows) or 1.0
    axes = _Axes(rows[0][0] - 0.5, rows[-1][0] + 0.5, 0.0, top * 1.05)
    pitch = (axes.x(1.0) - axes.x(0.0)) * (rows[1][0] - rows[0][0] if len(rows) > 1 else 1)
    bars = [_bar(axes, epoch, values, names, min(0.85 * pitch, 60.0)) for epoch, values in rows]
    return _svg(label, [axes.grid(), _EPOCH, *bars])


def trade_off_chart(points: Sequence[tuple[str, float, float]], label: str) -> str | None:
    """SVG of named points (name, x, y), joined in their order; None if none is finite."""
    known = [(name, x, y) for name, x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not known:
        return None
    xs, ys = [x for _, x, _ in known], [y for _, _, y in known]
    axes = _Axes(*_padded(min(xs), max(xs)), *_padded(min(ys), max(ys)))
    style = 'style="--c: var(--series-0)"'
    path = f'<polyline class="curve faint" {style} points="{_path(axes, [(x, y) for _, x, y in known])}"/>'
    spots, taken = [], list[tuple[float, float]]()
    for name, x, y in known:
        where = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="4"'
        told = escape(f"{name}: {x:.5g}, {y:.5g}")
        spots.append(f'<circle class="spot" {style} {where}><title>{told}</title></circle>')
        anchor, shift = ("end", -7) if axes.x(x) > WIDTH / 2 else ("start", 7)
        left, height = _free_place(axes.x(x) + shift, axes.y(y) - 6, taken)
        taken.append((left, height))
        place = f'x="{left:.1f}" y="{height:.1f}" text-anchor="{anchor}"'
        spots.append(f"<text {place}>{escape(name)}</text>")
    return _svg(label, [axes.grid(whole=False), path, *spots])


def _free_place(left: float, height: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of a name: the given place, or below it where earlier names stand."""
    while any(abs(left - x) < _LABEL_WIDTH and abs(height - y) < _LABEL_HEIGHT for x, y in taken):
        height += _LABEL_HEIGHT
    return left, height


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Trailing mean over a twentieth of the points, at least five; gaps stay out of it."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    window = max(5, len(finite) // 20)
    means = []
    for n, (x, _) in enumerate(finite):
        recent = [y for _, y in finite[max(0, n - window + 1) : n + 1]]
        means.append((x, sum(recent) / len(recent)))
    return means


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers in low..high."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def short(value: float) -> str:
    """A number in at most about seven characters."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').removesuffix('.')}e{int(exponent)}"
    return f"{value:.4g}"


class _Axes:
    def __init__(self, x0: float, x1: float, y0: float, y1: float) -> None:
        if x0 == x1:
            x0, x1 = x0 - 0.5, x1 + 0.5
        self.x0, self.x1, self.y0, self.y1 = x0, x1, y0, y1

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)

    def grid(self, *, whole: bool = True) -> str:
        """Lines and numbers; `whole` numbers only along x, where that is an epoch."""
        parts = []
        for value in ticks(self.y0, self.y1):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
        for value in ticks(self.x0, self.x1, 7 if whole else 5):
            if not whole or value == round(value):
                where = f'x="{self.x(value):.1f}" y="{HEIGHT - 10}"'
                parts.append(f'<text {where} text-anchor="middle">{short(value)}</text>')
        return "".join(parts)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _with_errors(curve: Series) -> Iterable[tuple[Point, float]]:
    errors = curve.errors or [0.0] * len(curve.points)
    return ((point, error or 0.0) for point, error in zip(curve.points, errors, strict=True))


def _curve(axes: _Axes, curve: Series) -> str:
    points = _bucketed(curve.points)
    style = f'class="curve{" faint" if curve.faint else ""}" style="--c: var(--series-{curve.color % 6})"'
    runs = [f'<polyline {style} points="{_path(axes, run)}"/>' for run in _runs(points)]
    return "".join(runs) + ("" if curve.faint else _markers(axes, curve))


def _markers(axes: _Axes, curve: Series) -> str:
    """Each measured point with its value on hover, where there are few."""
    finite = [(point, error) for point, error in _with_errors(curve) if math.isfinite(point[1])]
    if len(finite) > _MARKED_POINTS:
        return ""
    style, parts = f'style="--c: var(--series-{curve.color % 6})"', []
    for (epoch, value), error in finite:
        x, low, high = axes.x(epoch), axes.y(max(value - error, axes.y0)), axes.y(value + error)
        if error:
            parts.append(f'<line class="error" {style} x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        told = escape(f"{curve.name}, epoch {short(epoch)}: {value:.5g}" + (f" ±{error:.2g}" if error else ""))
        spot = f'cx="{x:.1f}" cy="{axes.y(value):.1f}" r="3"'
        parts.append(f'<circle class="spot" {style} {spot}><title>{told}</title></circle>')
    return "".join(parts)


def _runs(points: Iterable[Point]) -> list[list[Point]]:
    """Points cut where a value is not finite."""
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _bucketed(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= _MAX_POINTS:
        return points
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _bucketed_rows(rows: Sequence[tuple[int, Sequence[float]]]) -> list[tuple[int, list[float]]]:
    size = -(-len(rows) // _MAX_BARS)
    groups = [rows[n : n + size] for n in range(0, len(rows), size)]
    return [(g[0][0], [sum(column) / len(g) for column in zip(*(v for _, v in g), strict=True)]) for g in groups]


def _bar(axes: _Axes, epoch: int, values: Sequence[float], names: Sequence[str], width: float) -> str:
    base, parts = 0.0, []
    for color, (name, value) in enumerate(zip(names, values, strict=True)):
        top, bottom = axes.y(base + value), axes.y(base)
        box = f'x="{axes.x(epoch) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"'
        told = escape(f"{name}, epoch {epoch}: {value:.1f} s")
        style = f'style="--c: var(--series-{color % 6})"'
        parts.append(f'<rect class="bar" {style} {box}><title>{told}</title></rect>')
        base += value
    return "".join(parts)


def _path(axes: _Axes, points: Iterable[Point]) -> str:
    return " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)


def _svg(label: str, parts: Iterable[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"
