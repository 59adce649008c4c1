"""Draws a caption: float32 pictures with anti-aliased shapes, made from nothing but a random generator."""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fdfo_engine.shapes.scene import COLOURS, Facts, parse

Image = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
_Outside = Callable[[Array, Array, float], Array]

SIZE = 64
HUES: dict[str, float] = dict(zip(COLOURS, (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 0.82), strict=True))
"""Hue of each colour, in turns from red."""

_HUE_JITTER = 0.018
_TURN = 0.15
_MARGIN = 2.0
_GAP = 3.5
_RELATION_SHARE = 0.3
_SIDEWAYS_SHARE = 0.5
_RADII = {1: (11.0, 15.0), 2: (10.0, 13.0), 3: (9.5, 11.5)}
_DIRECTIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}


@dataclass(frozen=True)
class Placed:
    """One object of a picture: centre and radius in pixels, y downward."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


def render(caption: str, rng: np.random.Generator) -> Image:
    """Returns a picture of the caption, float32 [3, 64, 64] in 0..1, RGB. Raises ValueError as `parse` does."""
    return draw(place(parse(caption), rng), rng)


def place(facts: Facts, rng: np.random.Generator) -> list[Placed]:
    """Finds places without overlap that satisfy the relation with room to spare."""
    while True:  # a random layout fails about half of the time, so this ends soon
        layout = [_random_place(colour, shape, len(facts.objects), rng) for colour, shape in facts.objects]
        if _apart(layout) and _related(layout, facts.relation):
            return layout


def _random_place(colour: str, shape: str, count: int, rng: np.random.Generator) -> Placed:
    radius = float(rng.uniform(*_RADII[count]))
    x, y = rng.uniform(radius + _MARGIN, SIZE - radius - _MARGIN, 2)
    return Placed(colour, shape, float(x), float(y), radius)


def _apart(layout: list[Placed]) -> bool:
    return all(
        math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + _GAP for i, a in enumerate(layout) for b in layout[:i]
    )


def _related(layout: list[Placed], relation: str | None) -> bool:
    if relation is None:
        return True
    (dx, dy), first, second = _DIRECTIONS[relation], *layout
    along = (second.x - first.x) * dx + (second.y - first.y) * dy
    across = abs((second.x - first.x) * dy + (second.y - first.y) * dx)
    return along > _RELATION_SHARE * SIZE and across < _SIDEWAYS_SHARE * along


def draw(layout: list[Placed], rng: np.random.Generator) -> Image:
    """Paints the objects over a random background."""
    image = _background(rng)
    for item in layout:
        cover = _coverage(item, float(rng.uniform(-_TURN, _TURN)))
        image += cover * (_paint(item.colour, rng)[:, None, None] - image)
    return np.clip(image, 0, 1).astype(np.float32)


def _paint(colour: str, rng: np.random.Generator) -> Array:
    hue = HUES[colour] + rng.uniform(-_HUE_JITTER, _HUE_JITTER)
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.85, 1.0), rng.uniform(0.82, 1.0)))


def _background(rng: np.random.Generator) -> Array:
    """A near-grey tint with a gradient and a little grain: never as saturated as a shape."""
    tint = rng.uniform(0.08, 0.92) + rng.uniform(-0.04, 0.04, 3)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.15)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    ramp = slope * (xs * math.cos(angle) + ys * math.sin(angle))
    grain = rng.normal(0, rng.uniform(0, 0.015), (SIZE, SIZE))
    return np.asarray(np.clip(tint[:, None, None] + ramp + grain, 0.02, 0.98))


def _coverage(item: Placed, turn: float) -> Array:
    """Share of each pixel that the shape covers, from its signed distance: about a pixel of anti-aliasing."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    dx, dy = xs - item.x, ys - item.y
    upright = turn + math.pi / (4 if item.shape == "square" else 2)
    distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx) + upright
    return np.asarray(np.clip(0.5 - _OUTSIDE[item.shape](distance, angle, item.radius), 0, 1))


def _circle(distance: Array, angle: Array, radius: float) -> Array:
    return distance - 0.85 * radius


def _polygon(corners: int) -> _Outside:
    """Signed distance (pixels, negative inside) of a regular polygon whose corners lie at the radius."""
    half = math.pi / corners

    def outside(distance: Array, angle: Array, radius: float) -> Array:
        folded = (angle + half) % (2 * half) - half
        return np.asarray(distance * np.cos(half - np.abs(folded)) - radius * math.cos(half))

    return outside


_OUTSIDE: dict[str, _Outside] = {"circle": _circle, "square": _polygon(4), "triangle": _polygon(3)}
