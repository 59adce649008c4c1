"""Settings back to text."""

from typing import Any

import yaml

from fdfo_engine.config.schema import Config
from fdfo_engine.config.yaml_source import CoreDumper

RESUMABLE_KEYS = (
    "run.epochs", "run.dir", "log", "checkpoint", "evaluation.guard", "model.prompt_cache", "model.prompt_cache_gib",
    "model.few_steps", "prompts.allow_download", "sampling.overlap_scoring", "update.max_bad_pairs", "labels",
    "kernels.tune", "comm",
)  # fmt: skip
"""Keys and whole sections that may differ when a run is resumed: none of them changes what a past epoch computed.

`run.dir` is among them because a folder can be named in several ways, or moved.
"""

_SERVERS = ("http", "vlm_server")
_OF_SERVERS = ("url", "timeout_s", "give_up_after_s", "concurrency", "ask_first")


def resumable_keys(config: Config) -> tuple[str, ...]:
    """`RESUMABLE_KEYS`, and where each reward and metric may now be found: its server's address and patience.

    A URL as a reward's name counts as the `url` of `http`: see `with_named_servers`.
    """
    lists = {"rewards": config.rewards, "evaluation.metrics": config.evaluation.metrics}
    parts = [(f"{key}.{i}", part.name) for key, entries in lists.items() for i, part in enumerate(entries)]
    servers = [where for where, name in parts if name in _SERVERS or _is_url(name)]
    return (
        *RESUMABLE_KEYS,
        *(f"{where}.{key}" for where, _ in parts for key in ("allow_download", "kill_after_s")),
        *(f"{where}.{key}" for where in servers for key in _OF_SERVERS),
    )


def with_named_servers(tree: Any) -> Any:
    """Settings read from YAML, each reward named by a URL written as `{name: http, url: ...}`, which is the same."""
    if isinstance(tree, list):
        return [with_named_servers(entry) for entry in tree]
    if not isinstance(tree, dict):
        return tree
    if isinstance(name := tree.get("name"), str) and _is_url(name):
        return {"url": name, **tree, "name": "http"}
    return {key: with_named_servers(value) for key, value in tree.items()}


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def dump_config(config: Config) -> str:
    """Every resolved key as YAML 1.2 (and 1.1) text, which `load_config` reads back to an equal config."""
    tree = config.model_dump(mode="json")
    if config.model.train == "full":
        del tree["lora"]  # refused beside full training, even at its defaults
    return yaml.dump(tree, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120)
