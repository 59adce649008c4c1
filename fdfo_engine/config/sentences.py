"""Pydantic's errors in our own words: the key, what it was, what it takes, the nearest name."""

import difflib
import json
import math
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fdfo_engine.config.key_help import KeyHelp, all_keys, find_key
from fdfo_engine.config.secret_keys import SECRET_ADVICE, is_secret_key, is_secret_value
from fdfo_engine.config.variants import VARIANTS
from fdfo_engine.config.yaml_source import Path, dotted

Problem = tuple[Path, str]
"""Where a problem is, and what follows the key in its message: `: unknown key`, ` = 3: takes text`."""


def problems_of(error: ValidationError, data: dict[str, Any]) -> list[Problem]:
    """Every problem once, in pydantic's order; the branches of a union that failed give one together."""
    found: dict[Problem, None] = {}
    details = error.errors(include_url=False)
    for detail in details:
        if not (detail["type"] == "too_short" and _has_deeper(detail["loc"], details)):
            found |= dict.fromkeys(_problems(detail, data))
    return list(found)


def _has_deeper(loc: tuple[int | str, ...], details: list[ErrorDetails]) -> bool:
    """Whether the items of a list are what is wrong: pydantic then also calls the list too short."""
    return any(len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in details)


def shown(value: Any) -> str:
    """A value as a message may show it: short, and never a secret."""
    if isinstance(value, dict):
        return "a mapping" if value else "{}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "a list"
    if is_secret_value(value) or (isinstance(value, list) and any(map(is_secret_value, value))):
        return "***"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _problems(detail: ErrorDetails, data: dict[str, Any]) -> Iterator[Problem]:
    path, variant = _locate(detail["loc"], data)
    match detail["type"]:
        case "fdfo":
            for key, sentence in detail["ctx"]["problems"]:
                yield (*path, *_parts(key)), f": {sentence}"
        case "extra_forbidden":
            yield path, _unknown(path, variant)
        case "missing" if path[-1] == detail["loc"][-1]:
            yield path, _missing(path, variant, _at(data, path[:-1]))
        case "union_tag_invalid" | "union_tag_not_found" if isinstance(_at(data, path), dict):
            tag = VARIANTS[dotted(path)].tag
            names = [h.variant for h in all_keys() if h.key == f"{dotted(path)}.{tag}" and h.variant]
            value = _at(data, path).get(tag)
            near = difflib.get_close_matches(str(value), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield (*path, tag), f" = {shown(value)}: takes {', '.join(names)}{hint}"
        case _:
            yield _wrong(path, variant, data)


def _parts(key: str) -> Path:
    return tuple(key.split(".")) if key else ()


def _locate(loc: tuple[int | str, ...], data: dict[str, Any]) -> tuple[Path, str | None]:
    """The path of an error in `data`: pydantic mixes in names of union branches, one of which is the kind's."""
    node: Any = data
    path: Path = ()
    variant = None
    for i, part in enumerate(loc):
        if part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node)):
            node = node[part]
            path = (*path, part)
        elif isinstance(node, dict) and i == len(loc) - 1 and find_key(dotted((*_starred(path), part))):
            path = (*path, part)  # a missing key
        elif isinstance(part, str):
            variant = part
    return path, variant


def _starred(path: Path) -> Path:
    return tuple("*" if isinstance(part, int) else part for part in path)


def _at(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part]
    return data


def _wrong(path: Path, variant: str | None, data: dict[str, Any]) -> Problem:
    help_ = find_key(dotted(_starred(path)), variant)
    while help_ is None:  # an item of a plain list: the list is what has a help
        path = path[:-1]
        help_ = find_key(dotted(_starred(path)), variant)
    value = _at(data, path)
    return path, f" = {shown(value)}: takes {_takes(help_, value)}{_hint(help_, value)}"


def _takes(help_: KeyHelp, value: Any) -> str:
    is_number = isinstance(value, float) and not math.isfinite(value)
    return help_.takes.replace("a number", "a finite number") if is_number else help_.takes


def _hint(help_: KeyHelp, value: Any) -> str:
    """How to write what was probably meant."""
    if isinstance(value, bool | int | float) and help_.takes_text and "text" in help_.takes:
        return "; quote it to make it text"
    if not isinstance(value, str):
        return ""
    if "number" in help_.takes and _is_number(value):
        return "; remove the quotes"
    words = [word.strip(",") for word in help_.takes.split() if word not in ("or", "a", "and")]
    near = difflib.get_close_matches(value, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _missing(path: Path, variant: str | None, section: dict[str, Any]) -> str:
    help_ = find_key(dotted(_starred(path)), variant)
    known = {h.key.rsplit(".", 1)[-1] for h in all_keys() if h.key.startswith(dotted(_starred(path[:-1])))}
    near = difflib.get_close_matches(str(path[-1]), [str(key) for key in section if key not in known], n=1)
    hint = f"; is {near[0]!r} a slip for it?" if near and not is_secret_key(near[0]) else ""
    return f": missing; takes {help_.takes if help_ else 'a value'}{hint}"


def _unknown(path: Path, variant: str | None) -> str:
    """An unknown key is named, its value never shown: it may be a secret under any name."""
    name, parent = str(path[-1]), dotted(_starred(path[:-1]))
    if is_secret_key(name):
        return f": unknown key; {SECRET_ADVICE}"
    siblings = [h.key for h in all_keys() if h.key.rpartition(".")[0] == parent and h.variant in (None, variant)]
    everywhere = [h.key for h in all_keys()]
    elsewhere = next((key for key in everywhere if key.rpartition(".")[2] == name), None)
    near = elsewhere or _nearest(name, siblings) or _nearest(name, everywhere)
    if near:
        return f": unknown key; did you mean {near}?"
    return f": unknown key; takes {', '.join(key.rpartition('.')[2] for key in siblings)}"


def _nearest(name: str, keys: list[str]) -> str | None:
    """The key whose last part is closest to `name`."""
    by_leaf: dict[str, str] = {}
    for key in keys:
        by_leaf.setdefault(key.rpartition(".")[2], key)
    near = difflib.get_close_matches(name, by_leaf, n=1)
    return by_leaf[near[0]] if near else None
