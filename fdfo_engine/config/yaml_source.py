"""YAML 1.2 as the core schema has it, read into plain values that remember the line of every key.

PyYAML speaks 1.1: it reads `3e-5` as a text, `010` as 8 and `no` as false, and keeps the last of duplicate keys.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from fdfo_engine.config.problems import ConfigError
from fdfo_engine.config.secret_keys import redacted

Path = tuple[str | int, ...]
"""Where a value sits: keys of mappings and indices of lists."""

_PREFIX = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


@dataclass
class YamlTree:
    """A YAML document: its value, the line of every key, and the problems met on the way (`line, key, sentence`)."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str, str]] = field(default_factory=list)


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and without aliases, which could loop or explode."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node; an alias is refused where it stands."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported; write it out", mark)
        return super().compose_node(parent, index)


class CoreDumper(yaml.SafeDumper):
    """SafeDumper that also quotes texts which YAML 1.2 alone would read as something else, such as `3e-5`."""

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out: the loader takes no aliases."""
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (CoreLoader, CoreDumper):
        _class.add_implicit_resolver(_PREFIX + _tag, re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str, name: str) -> YamlTree:
    """Parses one document; `name` stands for the file in messages.

    Raises:
        ConfigError: it cannot be parsed; names the line and column, and shows the line.
    """
    loader = CoreLoader(text) if _is_printable(text, name) else None
    try:
        node = loader.get_single_node() if loader else None
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_broken(error, text, name)]) from error
    except RecursionError as error:
        raise ConfigError([f"{name}: lists or mappings nested too deeply"]) from error
    tree = YamlTree()
    tree.value = None if node is None else _value(node, (), tree)
    return tree


def _is_printable(text: str, name: str) -> bool:
    """PyYAML refuses control characters when a loader is made, without line or column."""
    match = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if match is None:
        return True
    line = text.count("\n", 0, match.start()) + 1
    raise ConfigError([f"{name}:{line}: character {match.group()!r} cannot stand in YAML; is this a text file?"])


def _broken(error: yaml.MarkedYAMLError, text: str, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "broken YAML"
    if "'\\t'" in problem:
        problem = "a tab cannot indent or separate YAML; use spaces"
    if mark is None:
        return f"{name}: {problem}"
    lines = text.splitlines() or [""]
    number = min(mark.line, len(lines) - 1)
    shown = redacted(lines[number]).replace("\t", "\\t")[:200]
    context = f" ({error.context})" if error.context and error.problem else ""
    return f"{name}:{mark.line + 1}:{mark.column + 1}: {problem}{context}\n    {shown}"


def _value(node: yaml.Node, path: Path, tree: YamlTree) -> Any:
    tree.lines.setdefault(path, node.start_mark.line + 1)
    if not isinstance(node, yaml.ScalarNode) and node.tag not in (_PREFIX + "map", _PREFIX + "seq"):
        tree.problems.append((node.start_mark.line + 1, dotted(path), _no_such_tag(node)))
    elif isinstance(node, yaml.MappingNode):
        return _mapping(node, path, tree)
    elif isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, i), tree) for i, item in enumerate(node.value)]
    elif isinstance(node, yaml.ScalarNode):
        return _scalar(node, path, tree)
    return None


def _mapping(node: yaml.MappingNode, path: Path, tree: YamlTree) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line, key = key_node.start_mark.line + 1, key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _PREFIX + "str":
            shown = repr(key) if isinstance(key, str) else "a list or mapping"
            tree.problems.append((line, dotted(path), f"a key must be a text, this is {shown}; quote it"))
        elif key in found:
            first = tree.lines[(*path, key)]
            tree.problems.append((line, dotted((*path, key)), f"given twice; it stands in line {first} already"))
        else:
            tree.lines[(*path, key)] = line
            found[key] = _value(value_node, (*path, key), tree)
    return found


def _no_such_tag(node: yaml.Node) -> str:
    return f"the tag {node.tag.replace(_PREFIX, '!!')} is not supported; write a plain value"


def _scalar(node: yaml.ScalarNode, path: Path, tree: YamlTree) -> Any:
    text, tag = node.value, node.tag.removeprefix(_PREFIX)
    if tag == "str":
        return text
    try:
        return {"null": _null, "bool": _bool, "int": _int, "float": _float}[tag](text)
    except KeyError:
        problem = _no_such_tag(node)
    except ValueError:
        problem = f"is no {tag} that can be read"
    tree.problems.append((node.start_mark.line + 1, dotted(path), problem))
    return None


def _null(text: str) -> None:
    if text.lower() not in ("", "~", "null"):
        raise ValueError(text)


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(re.sub(r"\.(?=[a-zA-Z])", "", text))


def dotted(path: Path) -> str:
    """`("rewards", 0, "weight")` as `rewards.0.weight`."""
    return ".".join(map(str, path))
