"""The world of the shapes bench: captions of one to three coloured shapes, and what each caption states."""

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

COLOURS: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
COUNTS: dict[str, int] = {"a": 1, "two": 2, "three": 3}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
WORDS: tuple[str, ...] = (
    *COUNTS,
    *COLOURS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *("left", "right", "of", "above", "below", "and"),
)
"""Every word a caption can hold: the tokenizer's vocabulary."""

MAX_OBJECTS = 3
HELD_OUT_SHARE = 8
"""One caption in this many is held out of pretraining and of RL."""

_FORM_WEIGHTS = (0.25, 0.35, 0.40)


@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and one shape."""

    count: int
    colour: str
    shape: str

    def text(self) -> str:
        """Returns the group as a caption words it: `two red squares`."""
        word = next(word for word, count in COUNTS.items() if count == self.count)
        return f"{word} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Facts:
    """What a caption states: one or two groups and, between two single objects, perhaps a relation."""

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def objects(self) -> tuple[tuple[str, str], ...]:
        """(colour, shape) of each object, in the order of the caption."""
        return tuple((group.colour, group.shape) for group in self.groups for _ in range(group.count))

    def text(self) -> str:
        """Returns the caption that states these facts."""
        return f" {self.relation or 'and'} ".join(group.text() for group in self.groups)


def parse(caption: str) -> Facts:
    """Reads a shapes caption. Raises ValueError, saying what was expected, for any other text."""
    text = " ".join(caption.lower().split()).rstrip(".")
    for joint in (*RELATIONS, "and"):
        first, found, second = text.partition(f" {joint} ")
        if found:
            relation = None if joint == "and" else joint
            return _checked(Facts((_parse_group(first, caption), _parse_group(second, caption)), relation), caption)
    return Facts((_parse_group(text, caption),))


def _parse_group(text: str, caption: str) -> Group:
    words = text.split()
    if len(words) == 3 and words[0] in COUNTS and words[1] in COLOURS:
        count = COUNTS[words[0]]
        shape = words[2].removesuffix("s") if count > 1 else words[2]
        if shape in SHAPES and words[2] == (f"{shape}s" if count > 1 else shape):
            return Group(count, words[1], shape)
    raise ValueError(
        f"not a shapes caption: {caption!r}: {text!r} should be a count ({', '.join(COUNTS)}), "
        f"a colour ({', '.join(COLOURS)}) and a shape ({', '.join(SHAPES)}; plural after two and three)"
    )


def _checked(facts: Facts, caption: str) -> Facts:
    if len(facts.objects) > MAX_OBJECTS:
        raise ValueError(f"not a shapes caption: {caption!r}: more than {MAX_OBJECTS} objects")
    if facts.relation and len(facts.objects) > 2:
        raise ValueError(f"not a shapes caption: {caption!r}: {facts.relation!r} joins two single objects")
    if facts.groups[0].text().split()[1:] == facts.groups[1].text().split()[1:]:
        raise ValueError(f"not a shapes caption: {caption!r}: both sides name the same objects")
    return facts


def split_of(caption: str) -> Split:
    """Returns the split a caption belongs to: a property of its text alone."""
    digest = hashlib.sha256(caption.encode()).digest()
    return "heldout" if digest[0] % HELD_OUT_SHARE == 0 else "train"


def captions(split: Split, count: int, seed: int) -> list[str]:
    """Draws `count` captions of a split: the same list for the same arguments.

    The three forms (one group, two groups, two objects in a relation) are drawn by fixed weights; within a form the
    captions come in a shuffled order and repeat only when the form is used up.
    """
    rng = random.Random(f"{split} {seed}")
    cycles = [itertools.cycle(rng.sample(form, len(form))) for form in _forms(split)]
    return [next(rng.choices(cycles, _FORM_WEIGHTS)[0]) for _ in range(count)]


@functools.cache
def _forms(split: Split) -> tuple[tuple[str, ...], ...]:
    kinds = list(itertools.product(COLOURS, SHAPES))
    alone = [Facts((Group(count, *kind),)) for kind in kinds for count in COUNTS.values()]
    pairs = list(itertools.permutations(kinds, 2))
    both = [
        Facts((Group(n, *first), Group(m, *second)))
        for (first, second), (n, m) in itertools.product(pairs, ((1, 1), (1, 2), (2, 1)))
    ]
    related = [
        Facts((Group(1, *first), Group(1, *second)), relation)
        for (first, second), relation in itertools.product(pairs, RELATIONS)
    ]
    texts = ([facts.text() for facts in form] for form in (alone, both, related))
    return tuple(tuple(text for text in form if split_of(text) == split) for form in texts)
