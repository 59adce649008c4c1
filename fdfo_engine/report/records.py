"""The forms of what a report reads: a record of another form, as damage leaves it, is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Number = float | None
"""None where there was none, or it was not finite."""


class Record(BaseModel):
    """Keys that are not named here are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class EpochLine(Record):
    """A line of metrics.jsonl."""

    __pydantic_extra__: dict[str, Number | str] = Field(init=False)
    epoch: int = Field(ge=0, lt=1 << 53)


class EvaluationLine(Record):
    """A line of evaluations.jsonl."""

    epoch: int = Field(ge=0, lt=1 << 53)
    metrics: dict[str, Number]
    metrics_stderr: dict[str, Number] = {}
    reward: Number = None
    reward_stderr: Number = None
    health: dict[str, Number] = {}
    health_std: dict[str, Number] = {}
    count: int = Field(default=0, ge=0, lt=1 << 53)
    guard: list[str] = []


class Pictured(Record):
    """One image of an evaluation."""

    file: str
    prompt: str
    scores: dict[str, Number] = {}


class Listing(Record):
    """The images that an evaluation has kept."""

    epoch: int = Field(ge=0, lt=1 << 53)
    items: list[Pictured]


class Cpu(Record):
    """A processor."""

    flags: list[str] = []


class Machine(Record):
    """environment.json."""

    packages: dict[str, str | None] = {}
    devices: list[dict[str, Any]] = []
    cpu: Cpu | None = None


def has_form(form: type[Record], value: Mapping[str, Any]) -> bool:
    """Whether `value` is a record of that form."""
    try:
        form.model_validate(value)
    except ValidationError:
        return False
    return True
