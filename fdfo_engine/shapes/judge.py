"""Judges a picture against its caption by looking at the pixels alone: no model, no access to how it was made.

Saturated pixels are sorted by hue, joined into components, and each component is described by a few moments that do
not depend on its size, place or rotation. Those decide its shape.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from fdfo_engine.shapes.render import HUES
from fdfo_engine.shapes.scene import COLOURS, SHAPES, Facts, parse

Array = npt.NDArray[np.float64]

_SIZE = 64
_CHROMA = 0.3
"""Saturation (largest minus smallest channel) above which a pixel belongs to an object; backgrounds stay below 0.1."""
_MIN_AREA = 0.006
_MAX_AREA = 0.25
_MAX_FOREGROUND = 0.5
_MAX_GRAIN = 0.1
_MAX_OBJECTS = 6
_RELATION_WEIGHT = 0.3
_RELATION_ROOM = 0.12
_DIRECTIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}

_SHAPE_LIMIT = 0.65
"""Largest distance from a prototype, in units of `_SPREAD`, at which a component counts as that shape."""
_PROTOTYPES: Array = np.array(  # in the order of SHAPES; measured on renders, whose own spread is a tenth of `_SPREAD`
    [
        [0.161, 0.0, 0.0, 0.0],
        [0.169, 0.0, 0.0, 0.268],
        [0.193, 0.0, 0.520, 0.0],
    ]
)
_SPREAD: Array = np.array([0.015, 0.25, 0.1, 0.1])  # a somewhat elongated shape is still that shape


@dataclass(frozen=True)
class Seen:
    """One object found in a picture: colour, distance to each shape's prototype, centre in shares of the width."""

    colour: str
    distances: tuple[float, ...]
    x: float
    y: float

    def shape_credit(self, shape: str) -> float:
        """Returns 1 if the object is this shape, else less than a half, falling with the distance."""
        own = self.distances[SHAPES.index(shape)]
        if own <= _SHAPE_LIMIT and own == min(self.distances):
            return 1.0
        return 0.5 / (1 + own / _SHAPE_LIMIT)


@dataclass(frozen=True)
class Verdict:
    """`score`: share of the caption's facts that the picture shows, 0..1; `strict`: all of them, and nothing else."""

    score: float
    strict: bool


def judge(caption: str, image: npt.NDArray[np.floating]) -> Verdict:
    """Judges one picture [3, H, H], RGB in 0..1, H >= 32. Raises ValueError for other text or another shape.

    Each object of the caption earns up to 1: half for its colour, half for its shape (an object of another colour
    earns at most 0.25 by its shape). Their mean, with weight 0.7 beside the relation where there is one, is divided
    by 1 + 0.5 * (objects too many). A picture without objects, noise for example, scores exactly 0.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2] or image.shape[1] < 32:
        raise ValueError(f"a picture is [3, H, H] with H >= 32, not {list(image.shape)}")
    facts, seen = parse(caption), find_objects(image)
    if not seen:
        return Verdict(0.0, False)
    credits, chosen = _match(facts, seen)
    score = sum(credits) / len(credits)
    if facts.relation:
        related = _relation_credit(facts.relation, chosen)
        score = (1 - _RELATION_WEIGHT) * score + _RELATION_WEIGHT * related
    score /= 1 + 0.5 * max(0, len(seen) - len(facts.objects))
    return Verdict(score, score > 1 - 1e-9)


def find_objects(image: npt.NDArray[np.floating]) -> list[Seen]:
    """Returns the objects of a picture [3, H, H], largest first, at most six; none in noise or a flat field."""
    sharp = _resized(np.nan_to_num(np.asarray(image, np.float64)).clip(0, 1))
    pixels = ndimage.uniform_filter(sharp, (0, 3, 3), mode="nearest")
    if np.abs(sharp - pixels).mean() > _MAX_GRAIN:
        return []
    top = pixels.max(axis=0)
    chroma = top - pixels.min(axis=0)
    mask = chroma > _CHROMA
    if not 0 < mask.mean() < _MAX_FOREGROUND:
        return []
    colours = np.where(mask, _nearest_colour(pixels, top, chroma), -1)
    found = [item for index in np.unique(colours[mask]) for item in _components(colours == index, chroma, index)]
    return [seen for _, seen in sorted(found, key=lambda item: -item[0])[:_MAX_OBJECTS]]


def _resized(pixels: Array) -> Array:
    """Averages or repeats blocks until the picture has 64 pixels or a little more, the size the limits were set at."""
    if pixels.shape[1] < _SIZE:
        return pixels.repeat(2, axis=1).repeat(2, axis=2)
    factor = pixels.shape[1] // _SIZE
    if factor == 1:
        return pixels
    size = pixels.shape[1] // factor
    pixels = pixels[:, : size * factor, : size * factor]
    return np.asarray(pixels.reshape(3, size, factor, size, factor).mean(axis=(2, 4)))


def _nearest_colour(pixels: Array, top: Array, chroma: Array) -> npt.NDArray[np.intp]:
    red, green, blue = pixels
    span = np.maximum(chroma, 1e-6)
    hue = np.where(
        top == red,
        (green - blue) / span % 6,
        np.where(top == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    centres = np.array([HUES[colour] for colour in COLOURS])
    away = np.abs(hue[None] / 6 - centres[:, None, None])
    return np.asarray(np.minimum(away, 1 - away).argmin(axis=0))


def _components(mask: npt.NDArray[np.bool_], chroma: Array, colour: int) -> list[tuple[float, Seen]]:
    labels, count = ndimage.label(mask)
    found = []
    for number, window in enumerate(ndimage.find_objects(labels, count), 1):
        inside = labels[window] == number
        share = inside.sum() / mask.size
        if _MIN_AREA <= share <= _MAX_AREA:
            weight = np.where(inside, chroma[window], 0)
            weight = np.minimum(weight / np.median(weight[inside]), 1)
            ys, xs = np.nonzero(inside)
            seen = _describe(weight[ys, xs], xs + window[1].start, ys + window[0].start, mask.shape[0], COLOURS[colour])
            found.append((float(share), seen))
    return found


def _describe(weight: Array, xs: Array, ys: Array, size: int, colour: str) -> Seen:
    total = weight.sum()
    x, y = float(weight @ xs / total), float(weight @ ys / total)
    distances = np.sqrt((((_moments(weight, xs - x, ys - y) - _PROTOTYPES) / _SPREAD) ** 2).mean(axis=1))
    return Seen(colour, tuple(distances.tolist()), (x + 0.5) / size, (y + 0.5) / size)


def _moments(weight: Array, dx: Array, dy: Array) -> Array:
    """Four numbers of a component: how far it spreads for its area, and its 2-, 3- and 4-fold asymmetry."""
    point = dx + 1j * dy
    squared = np.abs(point) ** 2
    spread = weight @ squared / weight.sum() ** 2
    turn = point / np.maximum(np.abs(point), 1e-6)
    powers = turn ** np.arange(2, 5)[:, None]
    folds = np.abs(powers @ (weight * squared)) / (weight @ squared)
    return np.array([spread, *folds])


def _match(facts: Facts, seen: list[Seen]) -> tuple[list[float], list[Seen | None]]:
    """Gives each object of the caption a different object of the picture, or none, so that the credits are largest."""
    wanted = facts.objects
    places: list[Seen | None] = [*seen, *([None] * len(wanted))]
    best = max(
        itertools.permutations(places, len(wanted)) if len(wanted) > 1 else ((place,) for place in places),
        key=lambda chosen: sum(map(_credit, wanted, chosen)),
    )
    return [_credit(want, item) for want, item in zip(wanted, best, strict=True)], list(best)


def _credit(want: tuple[str, str], item: Seen | None) -> float:
    if item is None:
        return 0.0
    colour, shape = want
    by_shape = item.shape_credit(shape)
    return 0.5 + 0.5 * by_shape if item.colour == colour else 0.25 * by_shape


def _relation_credit(relation: str, chosen: list[Seen | None]) -> float:
    """Returns 1 where the second lies clearly in the relation's direction from the first, 0 where not at all."""
    first, second = chosen
    if first is None or second is None:
        return 0.0
    dx, dy = _DIRECTIONS[relation]
    along = (second.x - first.x) * dx + (second.y - first.y) * dy
    across = abs((second.x - first.x) * dy + (second.y - first.y) * dx)
    return float(np.clip((along - 0.5 * across) / _RELATION_ROOM, 0, 1))
