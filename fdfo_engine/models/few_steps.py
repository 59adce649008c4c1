"""Models that were distilled to a few solver steps, and how they are known.

Such a network jumps instead of following a flow: along more steps than it was made for its velocity is no flow's, and
there is nothing that it could be improved towards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdfo_engine.config import Config
from fdfo_engine.models.base_files import INDEX_NAME
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.runtime.json_text import json_object

SCHNELL_STEPS = 4
LIGHTNING_STEPS = 8

_STEPS_BY_WORD = {
    "schnell": 4, "turbo": 4, "flash": 4, "dmd": 4, "dmd2": 4, "turbox": 8, "lightning": 8, "lcm": 8, "hyper": 16,
}  # fmt: skip
"""Words in the names of published few-step models, with the most steps that models so called are made for."""

_STEPS_IN_NAME = re.compile(r"(?<![0-9])([0-9]{1,2})-?steps?(?![a-z])")
_NAMES_NOTHING = re.compile(
    r"[0-9a-f]{7,64}|snapshots|main|diffusers|pipeline|models?|base|latest|transformer|scheduler"
)
_CONFIG_NAMES = {"transformer": "config.json", "scheduler": "scheduler_config.json"}


@dataclass(frozen=True)
class FewSteps:
    """The most steps that a model was distilled to, and the sign by which it is known."""

    most: int
    sign: str


def refuse_many_steps(config: Config, folder: Path) -> None:
    """Refuses more steps than the pipeline in `folder` was distilled to, as far as its configs and names tell.

    Raises:
        UsageError: `sampling.steps` is larger.
    """
    setting = config.model.few_steps
    if setting is False:
        return
    found = find_few_steps(config.model.id, folder) if setting == "auto" else FewSteps(setting, "model.few_steps")
    if found is not None and config.sampling.steps > found.most:
        way_out = "" if setting != "auto" else "; model.few_steps: false, or the number, where that is wrong"
        raise UsageError(
            f"sampling.steps = {config.sampling.steps}: this model takes 1 to {found.most} steps, for which it was "
            f"distilled ({found.sign}): along more of them its velocity is no flow's{way_out}"
        )


def find_few_steps(model_id: str, folder: Path) -> FewSteps | None:
    """What the configs of the pipeline in `folder`, and the names that it has had, say; None where nothing does."""
    index = _read(folder / INDEX_NAME)
    parts = {part: _read(folder / part / name) for part, name in _CONFIG_NAMES.items()}
    return _by_configs(index, parts["transformer"], parts["scheduler"]) or _by_names(
        {
            "model.id": model_id,
            "its folder": str(folder),
            INDEX_NAME: index.get("_name_or_path"),
            **{f"{part}/{_CONFIG_NAMES[part]}": config.get("_name_or_path") for part, config in parts.items()},
        }
    )


def _by_configs(index: dict[str, Any], transformer: dict[str, Any], scheduler: dict[str, Any]) -> FewSteps | None:
    pipeline, shifts = index.get("_class_name"), bool(scheduler.get("use_dynamic_shifting"))
    if not transformer or not scheduler:
        return None
    if pipeline == "FluxPipeline" and not transformer.get("guidance_embeds") and not shifts:
        return FewSteps(SCHNELL_STEPS, "without embedded guidance and shift it is FLUX.1-schnell")
    has_one_shift = scheduler.get("base_shift", 0.5) == scheduler.get("max_shift", 1.15)
    if pipeline == "QwenImagePipeline" and shifts and has_one_shift and scheduler.get("shift_terminal") is None:
        return FewSteps(LIGHTNING_STEPS, "one shift for all sizes, without a last sigma, is Qwen-Image-Lightning's")
    return None


def _by_names(names: dict[str, Any]) -> FewSteps | None:
    for where, name in names.items():
        own = _own_name(name) if isinstance(name, str) else ""
        words = [word for word in re.split(r"[^a-z0-9]+", own) if word in _STEPS_BY_WORD]
        if words:
            stated = _STEPS_IN_NAME.search(own)
            most = int(stated[1]) if stated else _STEPS_BY_WORD[words[0]]
            return FewSteps(most, f"{where} says {words[0]}: {name}")
    return None


def _own_name(path: str) -> str:
    """The part of a path or id that names the model: the last one that is no commit and no usual name of a folder."""
    own = (part.lower() for part in reversed(Path(path).parts) if not _NAMES_NOTHING.fullmatch(part.lower()))
    return next(own, "")


def _read(file: Path) -> dict[str, Any]:
    """A config; empty where there is none, or none that can be read: loading says so."""
    try:
        return json_object(file.read_bytes())
    except (OSError, ValueError):
        return {}
