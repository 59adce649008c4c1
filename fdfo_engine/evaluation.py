"""Scores churn-free images of fixed prompts and fixed noise: what a run is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.config import Config, RewardConfig
from fdfo_engine.engine import Engine, Weights
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.rollout.prompts import load_prompts
from fdfo_engine.runtime.distributed import all_gather_rows, rank, together, world_size


@dataclass(frozen=True)
class Evaluation:
    """Images `[N, 3, H, W]`, their prompts, and every metric's score `[N]`; NaN is no opinion."""

    prompts: list[str]
    images: Tensor
    scores: dict[str, Tensor]

    def record(self, engine: Engine, weights: Weights, seed: int) -> dict[str, object]:
        """The line of evaluations.jsonl: means and their standard errors over the images that were scored."""
        means, errors = {}, {}
        for name, scores in self.scores.items():
            known = scores[torch.isfinite(scores)].double()
            means[name] = float(known.mean())
            errors[name] = float(known.std() / max(len(known), 1) ** 0.5) if len(known) > 1 else 0.0
        used = "raw" if weights == "raw" or engine.ema is None else "ema"
        return {
            "epoch": engine.epoch, "count": len(self.prompts), "seed": seed, "weights": used,
            "metrics": means, "metrics_stderr": errors,
        }  # fmt: skip


def evaluation_prompts(config: Config) -> list[str]:
    """`evaluation.prompts`, or the run's own source; of the shapes generator the held-out captions."""
    settings = config.evaluation
    source = config.prompts.model_copy(update={"source": settings.prompts} if settings.prompts else {})
    if source.source == "shapes":
        source = source.model_copy(update={"count": settings.count})
    return load_prompts(source, settings.seed, split="heldout").prompts[: settings.count]


def metric_rewards(config: Config) -> WeightedRewards:
    """The run's rewards and then `evaluation.metrics`, each scored once."""
    own = {part.name for part in config.rewards}
    extra = [RewardConfig(name=name, weight=1.0) for name in config.evaluation.metrics if name not in own]
    return WeightedRewards.from_config([*config.rewards, *extra])


def evaluate(
    engine: Engine, prompts: list[str], metrics: WeightedRewards, *, seed: int, weights: Weights = "auto"
) -> Evaluation:
    """Generates one image a prompt and scores it; collective, and the result is the same on every rank."""
    images = engine.generate(prompts, seed=seed, weights=weights)
    count, ranks = len(prompts), world_size()
    own = slice(rank() * count // ranks, (rank() + 1) * count // ranks)
    parts = together(lambda: metrics(prompts[own], images[own])).parts
    return Evaluation(prompts, images, {name: all_gather_rows(score) for name, score in parts.items()})
