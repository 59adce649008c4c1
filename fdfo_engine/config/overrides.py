"""`section.key=value` from the command line, laid over the values of a file."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any

from fdfo_engine.config.problems import ConfigError
from fdfo_engine.config.secret_keys import SECRET_ADVICE, is_secret_key, redacted
from fdfo_engine.config.variants import VARIANTS
from fdfo_engine.config.yaml_source import Path, read_yaml

_PART = re.compile(r"[\w-]+")
"""Of a dotted key."""


@dataclass
class Overridden:
    """A tree with the overrides in it, the paths they set, and what was wrong with them."""

    tree: dict[str, Any]
    paths: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> Overridden:
    """Sets each override in a copy of `tree`: sections before keys in them, else in order, so the last one wins.

    A mapping has dotted keys and values as they are: `{"run.dir": "x"}`.
    """
    result = Overridden(copy.deepcopy(tree))
    parsed: list[tuple[list[str], Any]] = []
    for read in _readers(overrides):
        try:
            parsed.append(read())
        except ConfigError as error:
            result.problems += error.problems
    # a new kind of section clears the old one's keys, so it goes before the keys of its own
    for parts, value in sorted(parsed, key=lambda item: (len(item[0]), not _tells_kind(item[0]))):
        _set(result, parts, value)
    return result


def _readers(overrides: Sequence[str] | Mapping[str, Any]) -> list[Callable[[], tuple[list[str], Any]]]:
    if isinstance(overrides, Mapping):
        return [partial(_given, key, value) for key, value in overrides.items()]
    return [partial(_parse, text) for text in overrides]


def _parse(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    shown = redacted(text)
    if key.startswith("-"):
        raise ConfigError(
            [f"override {shown}: no such option; a setting is given without dashes, as section.key=value"]
        )
    if not equals or not all(map(_PART.fullmatch, key.strip().split("."))):
        raise ConfigError([f"override {shown}: takes section.key=value"])
    parts, _ = _given(key, None)
    document = read_yaml(value, f"override {key}")
    if document.problems:
        raise ConfigError([f"override {key}: {sentence}" for _, _, sentence in document.problems])
    return parts, document.value


def _given(key: object, value: Any) -> tuple[list[str], Any]:
    """The parts of a dotted key, and its value with paths as text and tuples as lists, as YAML would have them."""
    parts = str(key).strip().split(".")
    if not isinstance(key, str) or not all(map(_PART.fullmatch, parts)):
        raise ConfigError([f"override {key!r}: takes section.key as its name"])
    if is_secret_key(parts[-1]):
        raise ConfigError([f"override {key}: {SECRET_ADVICE}"])
    return parts, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def _set(result: Overridden, parts: list[str], value: Any) -> None:
    if _tells_kind(parts):
        _clear_other_kind(result.tree, parts[:-1], value)
    node: Any = result.tree
    path: Path = ()
    for i, part in enumerate(parts):
        index = _index(node, part)
        if index is None:
            what = f"has no item {part} ({len(node)} in all, from 0)" if isinstance(node, list) else "is no section"
            result.problems.append(f"override {'.'.join(parts)}: {'.'.join(parts[:i])} {what}")
            return
        path = (*path, index)
        if isinstance(node, list) and index == len(node):
            node.append({})
        if i == len(parts) - 1:
            node[index] = value
        elif isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[index]
    result.paths.add(path)


def _index(node: Any, part: str) -> str | int | None:
    """`part` as a key or an index of `node`; None if it can be neither. The index after the last item appends one."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) <= len(node):
        return int(part)
    return None


def _tells_kind(parts: Sequence[str]) -> bool:
    """Whether the key says which kind its section is."""
    variants = VARIANTS.get(".".join(parts[:-1]))
    return variants is not None and variants.tag == parts[-1]


def _clear_other_kind(tree: dict[str, Any], section: Sequence[str], kind: Any) -> None:
    variants = VARIANTS[".".join(section)]
    node: Any = tree
    for part in section:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict) and node.get(variants.tag, variants.default) != kind:
        node.clear()
