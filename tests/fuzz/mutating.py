"""Damage that is repeatable by its seed: to bytes, and to JSON and YAML by value."""

import copy
import json
import random
from collections.abc import Callable

import yaml

_DEEP = "a text that stands for a deeply nested value"
_LONG = "a text that stands for a number of 5,000 digits"
_TWICE = "a key that stands for the one beside it: "
HOSTILE = [
    None, True, False, 0, 1, -1, 0.5, -0.0, 2**31, 2**63, -(2**64), 10**400, 1e308, 5e-324, float("nan"), float("inf"),
    "", "0", "NaN", "x" * 10_000, "\0", "\x1b[31m", "\ud800", "../../etc/passwd", "{}%s", "1e999", "2024-01-01",
    [], {}, [[]], [None], {"a": {"b": []}}, {"": 0}, _DEEP, _LONG,
]  # fmt: skip
"""Values that programs are rarely written for."""

_PIECES = [bytes([code]) for code in b'\0\xff\xc3\n\r\t"{[}],:'] + [b"[" * 100_000, b"9" * 5000]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` after one to three accidents of a disk or an editor."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_ACCIDENTS)(data, rng)
    return data


def mutated_json(text: bytes, rng: random.Random) -> bytes:
    """The JSON document `text` with one to three of its values, keys or entries changed."""
    return _dumped(_changed(json.loads(text), rng))


def mutated_lines(text: bytes, rng: random.Random) -> bytes:
    """JSON lines with one of them changed by value, repeated, moved or left out."""
    lines = text.splitlines()
    number = rng.randrange(len(lines))
    change = rng.choice(("value", "value", "repeat", "move", "drop"))
    if change == "value":
        lines[number] = _dumped(_changed(json.loads(lines[number]), rng)).replace(b"\n", b" ")
    elif change == "repeat":
        lines.insert(rng.randrange(len(lines) + 1), lines[number])
    else:
        line = lines.pop(number)
        lines[0:0] = [line] if change == "move" else []
    return b"".join(line + b"\n" for line in lines)


def mutated_yaml(text: bytes, rng: random.Random) -> bytes:
    """The YAML document `text` with one to three of its values, keys or entries changed."""
    return _dumped(_changed(yaml.safe_load(text), rng))  # JSON is YAML


def mutations_of(name: str) -> list[Callable[[bytes, random.Random], bytes]]:
    """What can happen to a file of this name."""
    by_value = {".json": mutated_json, ".lock": mutated_json, ".jsonl": mutated_lines, ".yaml": mutated_yaml}
    return [mutated_bytes, *(change for ending, change in by_value.items() if name.endswith(ending))]


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\1"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 40) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(_PIECES) + data[place:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[: start + 60] + data[start:]


def _zeros(data: bytes, rng: random.Random) -> bytes:
    """What a crash of the machine leaves of blocks that were never written."""
    start = rng.randrange(len(data) + 1)
    length = min(512, len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def _replace(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (b"", b"\0" * 64, b"null", b"[]", b"{}", b"0", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf" + data, b"\n\n")
    )


_ACCIDENTS = (_flip, _flip, _cut, _drop, _insert, _insert, _repeat, _zeros, _replace)


def _changed(value: object, rng: random.Random) -> object:
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed_once(value, rng)
    return value


def _changed_once(value: object, rng: random.Random) -> object:
    """Goes down a random way, and changes what it ends at."""
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not children or rng.random() < 0.15:
        return _hostile(rng)
    key = rng.choice(children)
    change = rng.random()
    if change < 0.12:
        value.pop(key)
    elif change < 0.24 and isinstance(value, dict):
        value[_TWICE + str(key)] = _hostile(rng)
    elif change < 0.3 and isinstance(value, dict):
        value[str(rng.choice(HOSTILE))] = value.pop(key)
    else:
        value[key] = _changed_once(value[key], rng)
    return value


def _hostile(rng: random.Random) -> object:
    return copy.deepcopy(rng.choice(HOSTILE))


def _dumped(value: object) -> bytes:
    text = json.dumps(value, indent=1).replace(_TWICE, "")
    text = text.replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000).replace(f'"{_LONG}"', "9" * 5000)
    return text.encode()
