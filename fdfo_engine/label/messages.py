"""What the page's scripts send."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

RoundName = Annotated[str, StringConstraints(pattern=r"^[rc][0-9]{1,15}$")]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Taps = Annotated[int, Field(ge=0, le=100_000)]


class Message(BaseModel):
    """A body: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class Entry(Message):
    """The word behind the # of a link."""

    word: Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Label(Message):
    """An answer to one showing of a pair."""

    round: RoundName
    pair_id: Count
    repeat: bool = False
    """Whether left and right were swapped."""
    attempt: Count = 0
    """How many answers to this showing were taken back before."""
    choice: Literal["left", "right", "tie", "skip"]
    ms: Annotated[int, Field(ge=0, le=86_400_000)]
    """How long the person looked."""
    flips: Taps = 0
    zooms: Taps = 0


class Undo(Message):
    """Takes an answer back."""

    round: RoundName
    event: Count


class Train(Message):
    """Seals a round and trains on it."""

    round: RoundName


class NewRater(Message):
    """Asks for a link for one more rater."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@+-]{1,100}$")]


class Nothing(Message):
    """No fields."""
