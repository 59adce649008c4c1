"""What a GenEval prompt requires of its image, and which of it a list of detected objects fulfils.

After Ghosh, Hajishirzi and Schmidt, GenEval: an object-focused framework for evaluating text-to-image alignment (2023,
arXiv 2310.11513), whose files of requirements are read as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fdfo_engine.runtime.errors import PromptError
from fdfo_engine.runtime.text_file import lines_of, read_text

Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
COLORS: tuple[Color, ...] = get_args(Color)
Relation = Literal["left of", "right of", "above", "below"]

_FREE_SHARE = 0.1  # of the sum of both boxes' sizes: what centres may differ by and still be at one place
_LEAST_SHARE = 0.5  # of the distance that must lie along an axis for the relation of that axis to hold


class Box(NamedTuple):
    """Corners, pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float


class Detected(NamedTuple):
    """An object that a detector found, and how sure it is, 0..1."""

    box: Box
    confidence: float


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)

    name: str = Field(alias="class", min_length=1)
    count: int = Field(default=1, ge=1)


class Included(_Entry):
    """So many objects of a class at least, of a colour, at a place relative to those of entry `position[1]`."""

    color: Color | None = None
    position: tuple[Relation, int] | None = Field(default=None, strict=False)


class Requirements(BaseModel):
    """A line of GenEval's file. `exclude`: fewer than `count` objects of a class."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    prompt: str = Field(min_length=1)
    include: list[Included] = []
    exclude: list[_Entry] = []
    tag: str = ""

    @property
    def classes(self) -> list[str]:
        """Every class that matters, once."""
        return list(dict.fromkeys(entry.name for entry in (*self.include, *self.exclude)))

    @property
    def counts(self) -> bool:
        """Whether it matters that there are no more objects than asked for."""
        return bool({entry.name for entry in self.include} & {entry.name for entry in self.exclude})


def read_requirements(path: Path) -> dict[str, Requirements]:
    """The requirements in a .jsonl file by prompt.

    Raises:
        PromptError: no such file; a line that is not of that form, or that contradicts an earlier one on its prompt.
    """
    if not path.is_file():
        raise PromptError(f"metadata = {str(path)!r}: no such file ({path.resolve()})")
    found: dict[str, Requirements] = {}
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if line.strip():
            one = _parsed(line, f"{path}:{number}")
            if found.setdefault(one.prompt.strip(), one) != one:
                raise PromptError(f"{path}:{number}: other requirements of {one.prompt!r} than on an earlier line")
    if not found:
        raise PromptError(f"{path}: no requirements in it")
    return found


def fulfilled(
    wanted: Requirements, objects: Mapping[str, Sequence[Detected]], color_of: Callable[[str, Box], str]
) -> list[bool]:
    """Whether each thing asked for holds: of an included entry its count, and its colour and position if given.

    Args:
        wanted: the requirements.
        objects: what was found, by class, surest first.
        color_of: the colour of the object of a class in a box.
    """
    # as in GenEval, an entry speaks of its surest objects, as many as it asks for
    taken = [list(objects.get(entry.name, ()))[: entry.count] for entry in wanted.include]
    facts = []
    for entry, mine in zip(wanted.include, taken, strict=True):
        is_there = len(mine) == entry.count
        facts.append(is_there)
        if entry.color is not None:
            facts.append(is_there and all(color_of(entry.name, one.box) == entry.color for one in mine))
        if entry.position is not None:
            relation, other = entry.position
            others_are_there = len(taken[other]) == wanted.include[other].count
            facts.append(is_there and others_are_there and _all_lie(relation, mine, taken[other]))
    return facts + [len(objects.get(entry.name, ())) < entry.count for entry in wanted.exclude]


def _all_lie(relation: Relation, mine: Sequence[Detected], theirs: Sequence[Detected]) -> bool:
    """Whether each of `mine` lies so as seen from each of `theirs`, of which there are some."""
    return bool(theirs) and all(relation in relations(a.box, b.box) for a in mine for b in theirs)


def relations(one: Box, other: Box) -> set[Relation]:
    """Where `one` lies as seen from `other`.

    Their centres' offset on each axis, less a tenth of the sum of both sizes, must be more than half of their distance.
    """
    offset = [_middle(one, axis) - _middle(other, axis) for axis in (0, 1)]
    length = math.hypot(*offset)
    free = [_FREE_SHARE * (_size(one, axis) + _size(other, axis)) for axis in (0, 1)]
    shares = [(abs(o) - f) / length if abs(o) > f else 0.0 for o, f in zip(offset, free, strict=True)]
    names: tuple[tuple[Relation, Relation], ...] = (("left of", "right of"), ("above", "below"))
    return {names[axis][offset[axis] > 0] for axis in (0, 1) if shares[axis] > _LEAST_SHARE}


def without_doubles(found: Sequence[Detected], overlap: float) -> list[Detected]:
    """Surest first, without those that share more than `overlap` of their union with a surer one."""
    kept: list[Detected] = []
    for one in sorted(found, key=lambda one: -one.confidence):
        if all(_shared(one.box, other.box) <= overlap for other in kept):
            kept.append(one)
    return kept


def _parsed(line: str, where: str) -> Requirements:
    try:
        one = Requirements.model_validate_json(line)
    except ValidationError as error:
        raise PromptError(f"{where}: {'; '.join(_sentences(error))}") from error
    for entry in one.include:
        if entry.position is not None and not 0 <= entry.position[1] < len(one.include):
            raise PromptError(f"{where}: position {list(entry.position)}: there is no such entry of include")
    if not (one.include or one.exclude):
        raise PromptError(f"{where}: takes a list include, exclude, or both, of what the image must show")
    return one


def _sentences(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_input=False):
        yield f"{'.'.join(map(str, detail['loc']))}: {detail['msg'][0].lower()}{detail['msg'][1:]}".removeprefix(": ")


def _middle(box: Box, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2


def _size(box: Box, axis: int) -> float:
    return abs(box[axis + 2] - box[axis])


def _shared(one: Box, other: Box) -> float:
    """Intersection over union."""
    sides = [max(0.0, min(one[a + 2], other[a + 2]) - max(one[a], other[a])) for a in (0, 1)]
    both = sides[0] * sides[1]
    union = _size(one, 0) * _size(one, 1) + _size(other, 0) * _size(other, 1) - both
    return both / union if union > 0 else 0.0
