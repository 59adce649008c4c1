"""Settings back to text."""

import yaml

from fdfo_engine.config.schema import Config
from fdfo_engine.config.yaml_source import CoreDumper

RESUMABLE_KEYS = (
    "run.epochs", "run.dir", "log", "checkpoint", "evaluation.guard", "model.prompt_cache", "model.prompt_cache_gib",
    "prompts.allow_download", "sampling.overlap_scoring", "update.max_bad_pairs",
)  # fmt: skip
"""Keys and whole sections that may differ when a run is resumed: none of them changes what a past epoch computed.

`run.dir` is among them because a folder can be named in several ways, or moved.
"""


def dump_config(config: Config) -> str:
    """Every resolved key as YAML 1.2 (and 1.1) text, which `load_config` reads back to an equal config."""
    tree = config.model_dump(mode="json")
    if config.model.train == "full":
        del tree["lora"]  # refused beside full training, even at its defaults
    return yaml.dump(tree, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120)
