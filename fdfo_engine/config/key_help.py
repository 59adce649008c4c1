"""What every key takes, its default and its meaning, read off the schema: for `--help` and for error messages."""

import functools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fdfo_engine.config.schema import Config
from fdfo_engine.config.variants import VARIANTS

_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}
_BOUNDS = (
    ("exclusiveMinimum", "> {}"),
    ("minimum", ">= {}"),
    ("exclusiveMaximum", "< {}"),
    ("maximum", "<= {}"),
    ("multipleOf", "a multiple of {}"),
)


@dataclass(frozen=True)
class KeyHelp:
    """One key: dotted, with `*` for the index of a list; `variant` tells the kinds of a section apart."""

    key: str
    takes: str
    meaning: str
    required: bool = False
    default: str = ""
    variant: str | None = None
    takes_text: bool = False


@functools.cache
def all_keys() -> tuple[KeyHelp, ...]:
    """Help of every key, in the order of the schema; sections themselves included, without a default."""
    schema = Config.model_json_schema()
    return tuple(_walk(schema, schema["$defs"], "", None))


def find_key(key: str, variant: str | None = None) -> KeyHelp | None:
    """Help of a key, of the given kind of its section if the key is one of several."""
    found = [help_ for help_ in all_keys() if help_.key == key]
    return next((h for h in found if h.variant == variant), found[0] if found else None)


def describe_keys() -> str:
    """Every key with what it takes, its default and its meaning, one paragraph a section."""
    lines: list[str] = []
    for help_ in all_keys():
        if help_.key in Config.model_fields:
            lines += ["", f"{help_.key}: {help_.meaning}"]
        if not help_.default and not help_.required:
            continue
        lines += _lines_of(help_, meaning="" if help_.key in Config.model_fields else help_.meaning)
    return "\n".join(lines).strip() + "\n"


def describe_section(section: type[BaseModel]) -> str:
    """The same of one section alone: of a reward's options."""
    schema = section.model_json_schema()
    found = _walk(schema, schema.get("$defs", {}), "", None)
    return "\n".join(line for help_ in found for line in _lines_of(help_, meaning=help_.meaning))


def _lines_of(help_: KeyHelp, *, meaning: str) -> list[str]:
    title = f"  {help_.key}" + (f" [{help_.variant}]" if help_.variant else "")
    value = "required" if help_.required else f"default {help_.default}"
    wrapped = textwrap.wrap(meaning, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"{title} ({help_.takes}; {value})", *wrapped]


def _walk(schema: dict[str, Any], defs: dict[str, Any], prefix: str, variant: str | None) -> Iterator[KeyHelp]:
    for name, given in schema.get("properties", {}).items():
        key, node = prefix + name, _resolved(given, defs)
        is_section = bool(node.get("properties") or node.get("oneOf"))
        yield KeyHelp(
            key=key,
            takes=_takes(node, defs),
            meaning=given.get("description") or node.get("description", ""),
            required=name in schema.get("required", ()) and not is_section,
            default="" if is_section or "default" not in given else json.dumps(given["default"]),
            variant=variant,
            takes_text=_takes_text(node),
        )
        yield from _walk(node, defs, f"{key}.", variant)
        for option in node.get("oneOf", ()):
            of_variant = _resolved(option, defs)
            yield from _walk(of_variant, defs, f"{key}.", of_variant["properties"][VARIANTS[key].tag]["const"])
        if "items" in node:
            yield from _walk(_resolved(node["items"], defs), defs, f"{key}.*.", variant)


def _takes_text(node: dict[str, Any]) -> bool:
    return any(kind.get("type") == "string" for kind in (node, *node.get("anyOf", ())))


def _resolved(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    target: dict[str, Any] = defs[reference.rsplit("/", 1)[1]] if reference else node
    return target


def _takes(node: dict[str, Any], defs: dict[str, Any]) -> str:
    """`a whole number >= 1`, `auto or false`, ..."""
    node = _resolved(node, defs)
    if options := node.get("anyOf"):
        return " or ".join(_takes(option, defs) for option in options)
    if "const" in node:
        return _plain(node["const"])
    if "enum" in node:
        *first, last = map(_plain, node["enum"])
        return f"{', '.join(first)} or {last}"
    if "oneOf" in node or node.get("properties"):
        needed = node.get("required", [])
        return f"a mapping with {' and '.join(needed)}" if needed else "a mapping"
    if "prefixItems" in node:
        inner = {_takes(item, defs) for item in node["prefixItems"]}
        return f"a list of {len(node['prefixItems'])}, each {' or '.join(sorted(inner))}"
    return _with_bounds(node, defs)


def _with_bounds(node: dict[str, Any], defs: dict[str, Any]) -> str:
    bounds = [
        text.format(f"{node[name]:g}" if node[name] < 1e6 else node[name]) for name, text in _BOUNDS if name in node
    ]
    kind = _KINDS[node["type"]]
    if node["type"] == "string" and node.get("minLength"):
        kind = "non-empty text"
    if "items" in node:
        item = _takes(node["items"], defs)
        kind = ("a non-empty list" if node.get("minItems") else "a list") + f", each {item}"
    return " ".join([kind, " and ".join(bounds)]).strip()


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
