"""Settings back to text, and the difference between two of them."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from fdfo_engine.config.schema import Config
from fdfo_engine.config.yaml_source import CoreDumper

RESUMABLE_KEYS = ("run.epochs", "run.dir", "log", "checkpoint")
"""Keys and whole sections that may differ when a run is resumed: none of them changes what a past epoch computed.

`run.dir` is among them because a folder can be named in several ways, or moved.
"""


def dump_config(config: Config) -> str:
    """Every resolved key as YAML 1.2 (and 1.1) text, which `load_config` reads back to an equal config."""
    tree = config.model_dump(mode="json")
    if config.model.train == "full":
        del tree["lora"]  # refused beside full training, even at its defaults
    return yaml.dump(tree, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120)


def differing_keys(old: Config, new: Config, ignoring: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for every key that differs, leaving out keys and sections named in `ignoring`."""
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]
    kept = [key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in ignoring)]
    return [f"{key}: {_shown(before, key)} -> {_shown(after, key)}" for key in kept]


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= _leaves(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def _shown(leaves: dict[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else "absent"
