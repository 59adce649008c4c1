"""The list of what an evaluation measures: rewards, image health and within-prompt diversity, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdfo_engine.config import Config, RewardConfig
from fdfo_engine.evaluation.heldout import asked
from fdfo_engine.metrics import DIVERSITY, HEALTH, DiversityMeasure, measure_health
from fdfo_engine.metrics.embeddings import DEFAULT_CLIP, clip_diversity, dreamsim_diversity
from fdfo_engine.rewards import WeightedRewards, labelled
from fdfo_engine.rewards import names as reward_names
from fdfo_engine.runtime.errors import UsageError

Kind = Literal["reward", "health", "diversity"]
GROUPS = {"health": tuple(HEALTH), "diversity": tuple(DIVERSITY)}
"""Names that `--metrics` takes for several."""

MODEL_DIVERSITY = ("clip_diversity", "dreamsim_diversity")


@dataclass(frozen=True)
class Measures:
    """Scores images `[P, K, 3, H, W]` of P prompts, K seeds each, by everything in the list."""

    rewards: WeightedRewards
    health: tuple[str, ...]
    diversity: Mapping[str, DiversityMeasure]

    @property
    def kinds(self) -> dict[str, Kind]:
        """Every metric's name and kind, in the order of the tables."""
        kinds: dict[str, Kind] = dict.fromkeys(self.rewards.rewards, "reward")
        return kinds | dict.fromkeys(self.diversity, "diversity") | dict.fromkeys(self.health, "health")

    def __call__(self, prompts: Sequence[str], images_PK: Tensor) -> dict[str, Tensor]:
        """Float32 by name: `[P, K]` of rewards and health, `[P, 1]` of diversity; NaN is no opinion."""
        prompt_count, seeds = images_PK.shape[:2]
        if not prompt_count:
            return {n: torch.zeros(0, 1 if kind == "diversity" else seeds) for n, kind in self.kinds.items()}
        repeated, images = [p for p in prompts for _ in range(seeds)], images_PK.flatten(0, 1)
        by_image = self.rewards(repeated, images) | measure_health(images, self.health)
        by_prompt = {name: measure(images_PK)[:, None] for name, measure in self.diversity.items()}
        found = {name: score.view(prompt_count, seeds) for name, score in by_image.items()} | by_prompt
        return {name: found[name] for name in self.kinds}


def build_measures(
    config: Config,
    names: Sequence[str],
    *,
    more: Sequence[RewardConfig] = (),
    images_per_prompt: int,
    device: torch.device,
    clip: str = DEFAULT_CLIP,
    allow_download: bool = False,
) -> Measures:
    """The measures `names` and `more`: rewards (with the options the run gives them), health, diversity, their groups.

    Without names: the run's rewards, its `evaluation.metrics` and `more`, all health measures, and the diversity that
    needs no model. Rewards of one name have a column each, named as in the run's logs.

    Raises:
        UsageError: no such reward; diversity of one image a prompt.
        EnvironmentProblem: a measure's package or model is not here.
    """
    of_run = asked(config)
    known = labelled([*of_run.values(), *more])
    _refuse_unknown(names, known)
    added = list(known)[len(known) - len(more) :]
    wanted = _members([*names, *added] if names else [*known, "diversity", "health"])
    diverse = [name for name in wanted if name in DIVERSITY or name in MODEL_DIVERSITY]
    if diverse and images_per_prompt < 2:
        if names:
            raise UsageError(f"--metrics {diverse[0]}: needs two or more images a prompt; set --images-per-prompt")
        diverse = []
    keys = dict(zip(known, [*of_run, *["--metric"] * len(more)], strict=True))
    rewards = _rewards(wanted, known, keys)
    if not allow_download:
        rewards.forbid_downloads()
    diversity = {name: _diversity(name, device, clip, allow_download=allow_download) for name in diverse}
    return Measures(rewards, tuple(name for name in wanted if name in HEALTH), diversity)


def _members(names: Sequence[str]) -> list[str]:
    """Each name once, and in the place of a group its members."""
    found: list[str] = []
    for name in names:
        found += GROUPS.get(name, (name,))
    return list(dict.fromkeys(found))


def _rewards(wanted: Sequence[str], known: Mapping[str, RewardConfig], keys: Mapping[str, str]) -> WeightedRewards:
    """Those among the `wanted` names; `keys` say where a known one was asked for."""
    parts: dict[str, RewardConfig] = {}
    for name in wanted:
        if name not in (*HEALTH, *DIVERSITY, *MODEL_DIVERSITY):
            parts |= _named(known, name)
    return WeightedRewards.from_labelled(parts, keys=[keys.get(label, "--metrics") for label in parts])


def _diversity(name: str, device: torch.device, clip: str, *, allow_download: bool) -> DiversityMeasure:
    if name == "clip_diversity":
        return clip_diversity(clip, device, allow_download=allow_download)
    if name == "dreamsim_diversity":
        return dreamsim_diversity(device, allow_download=allow_download)
    return DIVERSITY[name]


def _refuse_unknown(names: Sequence[str], known: Mapping[str, RewardConfig]) -> None:
    """A misspelt name of `--metrics` is told with what it was near to."""
    takes = {*GROUPS, *HEALTH, *DIVERSITY, *MODEL_DIVERSITY, *reward_names(), *known, *(p.name for p in known.values())}
    for name in names:
        if name not in takes and ":" not in name:
            near = difflib.get_close_matches(name, sorted(takes), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(
                f"--metrics {name}: no such metric. {hint}Takes {', '.join(sorted(takes))}; your own: module:attribute"
            )


def _named(known: Mapping[str, RewardConfig], name: str) -> list[tuple[str, RewardConfig]]:
    """What a name stands for: a column of that name alone, all rewards of that name, or a reward without options."""
    alike = [(label, part) for label, part in known.items() if part.name == name]
    if not alike and name in known:
        return [(name, known[name])]
    return alike or [(name, RewardConfig(name=name, weight=1.0))]
