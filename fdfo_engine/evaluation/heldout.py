"""Scores churn-free images of fixed prompts and fixed noise: what a run is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.config import Config, EvaluationConfig, RewardConfig
from fdfo_engine.engine import Engine
from fdfo_engine.exporting import Weights
from fdfo_engine.metrics import measure_health
from fdfo_engine.rewards import WeightedRewards, labelled
from fdfo_engine.rollout.prompts import PromptList, load_prompts
from fdfo_engine.runtime.console import equal_warnings_counted
from fdfo_engine.runtime.distributed import all_gather_rows, rank, together_patiently, world_size
from fdfo_engine.runtime.progress import Phase


@dataclass(frozen=True)
class Evaluation:
    """Images `[N, 3, H, W]`, their prompts, and every metric's and health measure's value `[N]`; NaN is no opinion."""

    prompts: list[str]
    images: Tensor
    scores: dict[str, Tensor]
    health: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    """Means of what rewards note beside their scores; see `WeightedRewards.note_means`."""

    def record(self, engine: Engine, weights: Weights, seed: int) -> dict[str, Any]:
        """The line of evaluations.jsonl: means over the images that were scored, with their standard errors.

        Of a health measure the standard deviation over images instead; `reward` is the run's weighted sum.
        """
        means, errors = _means_and_errors(self.scores)
        total = _run_reward(engine.config, self.scores)
        reward, reward_error = _means_and_errors({"reward": total})
        used = "raw" if weights == "raw" or engine.ema is None else "ema"
        return {
            "epoch": engine.epoch, "count": len(self.prompts), "seed": seed, "weights": used,
            "metrics": means, "metrics_stderr": errors,
            "reward": reward["reward"], "reward_stderr": reward_error["reward"],
            "health": {name: float(_known(values).mean()) for name, values in self.health.items()},
            "health_std": {name: _spread(values) for name, values in self.health.items()},
            "notes": self.notes,
        }  # fmt: skip


def evaluation_prompts(config: Config) -> list[str]:
    """The first `evaluation.count` of `evaluation_list`."""
    return evaluation_list(config).prompts[: config.evaluation.count]


def evaluation_list(config: Config) -> PromptList:
    """`evaluation.prompts`, or the run's own source; of the shapes generator the held-out captions."""
    settings = config.evaluation
    source = config.prompts.model_copy(update={"source": settings.prompts} if settings.prompts else {})
    if source.source == "shapes":
        source = source.model_copy(update={"count": settings.count})
    return load_prompts(source, settings.seed, split="heldout")


def metric_rewards(config: Config) -> WeightedRewards:
    """The run's rewards and then `evaluation.metrics`, each scored once."""
    parts = asked(config)
    return WeightedRewards.from_labelled(labelled(list(parts.values())), keys=list(parts))


def asked(config: Config) -> dict[str, RewardConfig]:
    """What an evaluation scores, by the setting that names it: the run's rewards first.

    A metric that is nothing but the name of a reward of the run is that reward.
    """
    own = {part.name for part in config.rewards}
    rewards = {f"rewards.{i}.name": part for i, part in enumerate(config.rewards)}
    return rewards | {
        f"evaluation.metrics.{i}.name": part
        for i, part in enumerate(config.evaluation.metrics)
        if part.name not in own or part.model_extra
    }


@equal_warnings_counted()
def evaluate(
    engine: Engine, prompts: list[str], metrics: WeightedRewards, *, seed: int, weights: Weights = "auto"
) -> Evaluation:
    """Generates one image a prompt and scores it; collective, and the result is the same on every rank.

    Raises:
        Cancelled: `Engine.cancel` was called; `metrics` that wait for a server have given up and are of no more use.
    """
    progress, settings = engine.progress, engine.config.evaluation
    with progress.phase("evaluation", total=len(prompts)):
        images = engine.generate(prompts, seed=seed, weights=weights)
    with progress.phase("scoring", total=len(prompts)) as phase:

        def look() -> None:
            try:
                phase.look()
            except BaseException:
                metrics.cancel()
                raise

        parts, health = together_patiently(lambda: _measured(prompts, images, metrics, settings, phase), look)
    return Evaluation(prompts, images, _gathered(parts), _gathered(health), metrics.note_means())


def _measured(
    prompts: list[str], images: Tensor, metrics: WeightedRewards, settings: EvaluationConfig, phase: Phase
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and health of this rank's share: whole batches, which do not depend on how many ranks there are."""
    batches, ranks = -(-len(prompts) // settings.batch), world_size()
    scores: dict[str, list[Tensor]] = {name: [torch.zeros(0)] for name in metrics.rewards}
    health: dict[str, list[Tensor]] = {name: [torch.zeros(0)] for name in settings.health}
    for batch in range(rank() * batches // ranks, (rank() + 1) * batches // ranks):
        rows = slice(batch * settings.batch, (batch + 1) * settings.batch)
        for found, kept in ((metrics(prompts[rows], images[rows]), scores),
                            (measure_health(images[rows], settings.health), health)):  # fmt: skip
            for name, values in found.items():
                kept[name].append(values.cpu())
        phase.count(len(prompts[rows]) * ranks)  # the others have scored about as many
    return _joined(scores), _joined(health)


def _joined(kept: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(values) for name, values in kept.items()}


def _gathered(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: all_gather_rows(value) for name, value in values.items()}


def _run_reward(config: Config, scores: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of the run's own rewards, which come first in `scores`; not normalised, to be comparable."""
    own = zip(config.rewards, scores.values(), strict=False)
    return torch.stack([part.weight * score for part, score in own]).sum(0)


def _means_and_errors(scores: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    known = {name: _known(values) for name, values in scores.items()}
    errors = {name: _spread(values) / max(len(values), 1) ** 0.5 for name, values in known.items()}
    return {name: float(values.mean()) for name, values in known.items()}, errors


def _known(values: Tensor) -> Tensor:
    return values[torch.isfinite(values)].double()


def _spread(values: Tensor) -> float:
    known = _known(values)
    return float(known.std()) if len(known) > 1 else 0.0
