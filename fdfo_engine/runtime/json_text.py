"""JSON of our own files and of servers. Whatever else a damaged file or a reply holds is one kind of error."""

from __future__ import annotations

import json
from typing import Any


def json_value(text: bytes | str, *, takes_nan: bool = True) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, a key stands twice in an object, a number has too many digits, or it is nested too
            deeply; or NaN or Infinity stands in it, which Python writes and JSON has not, without `takes_nan`.
    """
    constant = float if takes_nan else _refuse_constant
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_object(text: bytes | str) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
        ValueError: as `json_value`; or it is a value of another type.
    """
    value = json_value(text)
    if not isinstance(value, dict):
        raise ValueError(f"is of type {type(value).__name__}, no object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found
