"""From a file and overrides to checked settings, or to every problem at once."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from fdfo_engine.config import yaml_source
from fdfo_engine.config.cross_checks import broken_rules
from fdfo_engine.config.overrides import apply_overrides
from fdfo_engine.config.problems import ConfigError
from fdfo_engine.config.schema import Config
from fdfo_engine.config.sentences import problems_of

MAX_BYTES = 1 << 20
"""More than this is no config, but some other file given by mistake."""


@dataclass(frozen=True)
class _Places:
    """Where each key was given."""

    file: str
    lines: dict[yaml_source.Path, int]
    overridden: set[yaml_source.Path]

    def of(self, path: yaml_source.Path) -> str:
        """`override`, or file and line of the key, or of the section it is in."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return "override"
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return self.file

    def message(self, path: yaml_source.Path, text: str) -> str:
        """A whole line: place, key, problem."""
        return f"{self.of(path)} {yaml_source.dotted(path)}{text}"


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Reads a YAML file, or a bundled config by its bare name (`shapes`), and lays overrides over it.

    They are texts, `section.key=value`, or a mapping with such keys: `{"run.dir": "x", "run.epochs": 3}`.

    Raises:
        ConfigError: every problem of the file and of the overrides, each with its place.
    """
    file = _find(path)
    tree = yaml_source.read_yaml(_read(file), str(file))
    if not tree.value and not tree.problems:
        raise ConfigError([f"{file}: no keys; start from a file under configs/"])
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else "a single value"
        raise ConfigError([f"{file}:{tree.lines[()]}: takes sections such as `run:`, this is {kind}"])
    problems = [f"{file}:{line} {f'{key}: ' if key else ''}{sentence}" for line, key, sentence in tree.problems]
    overridden = apply_overrides(tree.value, overrides)
    data = _without_empty_sections(overridden.tree)
    places = _Places(str(file), tree.lines, overridden.paths)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        found = [*problems_of(error, data), *_broken_rules_beside(error, data)]
        problems += overridden.problems + [places.message(key, text) for key, text in found]
        raise ConfigError(problems) from None
    if problems or overridden.problems:
        raise ConfigError(problems + overridden.problems)
    return config


def bundled_configs() -> dict[str, Path]:
    """Name and file of every config that comes with the package."""
    return {file.stem: file for file in sorted(shipped_folder("configs").glob("*.yaml"))}


def shipped_folder(place: str) -> Path:
    """A folder that comes with the package: inside it in a wheel, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next((f for f in (package / place, package.parent / place) if f.is_dir()), package / place)


def _find(path: str | Path) -> Path:
    given, file = str(path), Path(path)
    bundled = bundled_configs()
    if file.is_file():
        return file
    if given in bundled:
        return bundled[given]
    if file.is_dir():
        raise ConfigError([f"{given}: is a folder; takes a YAML file"])
    near = difflib.get_close_matches(file.stem, bundled, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        [f"{given}: no such file ({file.absolute()}); {hint}bundled ones, by name: {', '.join(bundled) or 'none'}"]
    )


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError([f"{file}: {file.stat().st_size} bytes; a config is a text file of a few kB"])
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{file}:{line}: no UTF-8 text"]) from error
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from error


def _without_empty_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """A section that is absent, or whose keys are all commented out, has its defaults and still its required keys."""
    sections = [name for name, field in Config.model_fields.items() if _is_section(field.annotation)]
    return tree | {name: {} for name in sections if tree.get(name) is None}


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _broken_rules_beside(error: ValidationError, data: dict[str, Any]) -> Iterator[tuple[yaml_source.Path, str]]:
    """Rules between sections that are valid, where others are not and pydantic therefore never came to the rules."""
    broken = {detail["loc"][0] for detail in error.errors() if detail["loc"]}
    if not broken:
        return
    valid = {
        name: TypeAdapter(field.rebuild_annotation()).validate_python(data[name])
        for name, field in Config.model_fields.items()
        if name not in broken and name in data
    }
    for key, text in broken_rules(Config.model_construct(**valid), set(valid)):
        yield tuple(key.split(".")), f": {text}"
