"""`section.key=value` from the command line, laid over the values of a file."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fdfo_engine.config.churn import RawChurn
from fdfo_engine.config.problems import ConfigError
from fdfo_engine.config.secret_keys import SECRET_ADVICE, is_secret_key, redacted
from fdfo_engine.config.yaml_source import Path, read_yaml

_CHURN_SCHEDULE: Path = ("sampling", "churn", "schedule")


@dataclass
class Overridden:
    """A tree with the overrides in it, the paths they set, and what was wrong with them."""

    tree: dict[str, Any]
    paths: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> Overridden:
    """Sets each override in a copy of `tree`: sections before keys in them, else in order, so the last one wins."""
    result = Overridden(copy.deepcopy(tree))
    parsed: list[tuple[list[str], Any]] = []
    for text in overrides:
        try:
            parsed.append(_parse(text))
        except ConfigError as error:
            result.problems += error.problems
    # a new schedule clears the old one's keys, so it goes before the keys of its own
    for parts, value in sorted(parsed, key=lambda item: (len(item[0]), tuple(item[0]) != _CHURN_SCHEDULE)):
        _set(result, parts, value)
    return result


def _parse(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    shown = redacted(text)
    if key.startswith("-"):
        raise ConfigError(
            [f"override {shown}: no such option; a setting is given without dashes, as section.key=value"]
        )
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError([f"override {shown}: takes section.key=value"])
    if is_secret_key(parts[-1]):
        raise ConfigError([f"override {key}: {SECRET_ADVICE}"])
    document = read_yaml(value, f"override {key}")
    if document.problems:
        raise ConfigError([f"override {key}: {sentence}" for _, _, sentence in document.problems])
    return parts, document.value


def _set(result: Overridden, parts: list[str], value: Any) -> None:
    if tuple(parts) == _CHURN_SCHEDULE:
        _clear_other_schedule(result.tree, value)
    node: Any = result.tree
    path: Path = ()
    for i, part in enumerate(parts):
        index = _index(node, part)
        if index is None:
            what = f"has no item {part} ({len(node)} in all, from 0)" if isinstance(node, list) else "is no section"
            result.problems.append(f"override {'.'.join(parts)}: {'.'.join(parts[:i])} {what}")
            return
        path = (*path, index)
        if i == len(parts) - 1:
            node[index] = value
        elif isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[index]
    result.paths.add(path)


def _index(node: Any, part: str) -> str | int | None:
    """`part` as a key or an index of `node`; None if it can be neither."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    return None


def _clear_other_schedule(tree: dict[str, Any], schedule: Any) -> None:
    sampling = tree.get("sampling")
    churn = sampling.get("churn") if isinstance(sampling, dict) else None
    if isinstance(churn, dict) and churn.get("schedule", RawChurn().schedule) != schedule:
        churn.clear()
