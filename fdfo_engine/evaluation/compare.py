"""Base against tuned: the same prompts and seeds for every set of weights, and what their difference says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.config import GuardConfig
from fdfo_engine.config.schema import MAX_SEED
from fdfo_engine.engine import Engine
from fdfo_engine.evaluation.guard import health_findings
from fdfo_engine.evaluation.measures import Kind, Measures
from fdfo_engine.exporting import Weights
from fdfo_engine.metrics import bootstrap_interval, health_drift, t_interval
from fdfo_engine.runtime.console import equal_warnings_counted
from fdfo_engine.runtime.distributed import all_gather_rows, is_main, rank, together_patiently, world_size
from fdfo_engine.runtime.progress import Phase

SCHEMA_VERSION = 1
PREVIEW_SIDE = 256


@dataclass(frozen=True)
class Request:
    """What every set of weights is asked for.

    Attributes:
        prompts: P texts. seed: image k of prompt p is keyed by (seed + k, p). images_per_prompt: K.
        steps, guidance_scale: of the solver; None takes the run's.
    """

    prompts: Sequence[str]
    seed: int = 0
    images_per_prompt: int = 1
    steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Measured:
    """One set of weights: `scores` `[P, K]` by metric (`[P, 1]` of diversity), `previews` uint8 `[P, 3, h, w]`.

    Previews are the first image of each prompt, at most 256 pixels a side, on rank 0 only (None elsewhere).
    """

    name: str
    epoch: int
    weights: str
    scores: dict[str, Tensor]
    previews: Tensor | None

    def by_prompt(self, metric: str) -> Tensor:
        """Float64 `[P]`: mean over the images of a prompt; NaN where one of them has no opinion."""
        return self.scores[metric].double().mean(1)

    def of_previews(self, metric: str) -> Tensor:
        """Float64 `[P]`: of the first image of each prompt."""
        return self.scores[metric].double()[:, 0]


@equal_warnings_counted()
def measure_weights(engine: Engine, request: Request, measures: Measures, *, name: str, weights: Weights) -> Measured:
    """Generates and scores every prompt with the engine's present weights; collective, the same on every rank.

    Work is cut at multiples of `evaluation.batch` prompts, which also are what a reward sees at once: the number of
    ranks does not change a bit of a score.
    """
    count = len(request.prompts) * request.images_per_prompt
    with engine.progress.phase("evaluation", total=count) as phase:
        parts, previews = _measured_parts(engine, request, measures, weights, phase)
    joined = {metric: torch.cat([part[metric] for part in parts]) for metric in measures.kinds}
    used = "raw" if weights == "raw" or engine.ema is None else "ema"
    return Measured(name, engine.epoch, used, joined, torch.cat(previews) if previews else None)


def _measured_parts(
    engine: Engine, request: Request, measures: Measures, weights: Weights, phase: Phase
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Of each stretch of the prompts the scores, and on rank 0 the pictures that are shown."""
    size = engine.config.evaluation.batch
    parts: list[dict[str, Tensor]] = []
    previews: list[Tensor] = []
    for first in range(0, len(request.prompts), size * world_size()):
        prompts = list(request.prompts[first : first + size * world_size()])
        images = _generate(engine, request, prompts, first, weights)
        own = slice(rank() * size, (rank() + 1) * size)
        scores = together_patiently(partial(measures, prompts[own], images[own]), phase.look)
        parts.append({metric: all_gather_rows(values) for metric, values in scores.items()})
        if is_main():
            previews.append(_previews(images[:, 0]))
    return parts, previews


def summarize(
    sets: Sequence[Measured],
    kinds: Mapping[str, Kind],
    request: Request,
    guard: GuardConfig,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> dict[str, Any]:
    """The result as plain JSON values; the first of `sets` is what the others are compared with.

    `summary`: by set and metric the mean over prompts with its t interval. `differences`: the paired difference prompt
    by prompt with its t and bootstrap intervals, and the share of prompts that rose. `health_findings`: sentences on
    health measures that left the band of `guard`; `health_drift`: how far each moved, in standard deviations of the
    first set's images. `scores`: of each prompt the mean over its images. `picture_scores`: by set and reward the score
    of each prompt's first image, the one that is shown.
    """
    base, rewards = sets[0], [metric for metric, kind in kinds.items() if kind == "reward"]
    return {
        "schema_version": SCHEMA_VERSION,
        "request": asdict(request) | {"prompts": len(request.prompts)},
        "confidence": confidence,
        "metrics": [{"name": name, "kind": kind} for name, kind in kinds.items()],
        "sets": [{"name": s.name, "epoch": s.epoch, "weights": s.weights} for s in sets],
        "summary": _by_set(sets, kinds, lambda s, metric: asdict(t_interval(s.by_prompt(metric), confidence))),
        "differences": _by_set(
            sets[1:], kinds, lambda s, m: _difference(s.by_prompt(m) - base.by_prompt(m), confidence, resamples)
        ),
        "health_findings": {
            s.name: list(health_findings(_health(s, kinds), _health(base, kinds), guard)) for s in sets[1:]
        },
        "health_drift": {s.name: _drifts(_health(s, kinds), _health(base, kinds)) for s in sets[1:]},
        "prompts": list(request.prompts),
        "scores": _by_set(sets, kinds, lambda s, metric: s.by_prompt(metric).tolist()),
        "picture_scores": _by_set(sets, rewards, lambda s, metric: s.of_previews(metric).tolist()),
    }


def _by_set(
    sets: Sequence[Measured], metrics: Iterable[str], value: Callable[[Measured, str], Any]
) -> dict[str, dict[str, Any]]:
    """The value of each set and metric, by their names."""
    return {measured.name: {metric: value(measured, metric) for metric in metrics} for measured in sets}


def _difference(by_prompt: Tensor, confidence: float, resamples: int) -> dict[str, Any]:
    known = by_prompt[torch.isfinite(by_prompt)]
    low, high = bootstrap_interval(known, confidence, resamples=resamples)
    shares = {"rose": float((known > 0).double().mean()), "fell": float((known < 0).double().mean())}
    return asdict(t_interval(known, confidence)) | {"bootstrap_low": low, "bootstrap_high": high} | shares


def _health(measured: Measured, kinds: Mapping[str, Kind]) -> dict[str, dict[str, float]]:
    """Means and standard deviations over images, as a line of evaluations.jsonl has them."""
    values = {n: measured.scores[n].double().flatten() for n, kind in kinds.items() if kind == "health"}
    known = {name: v[torch.isfinite(v)] for name, v in values.items()}
    spreads = {name: float(v.std()) if len(v) > 1 else 0.0 for name, v in known.items()}
    return {"health": {name: float(v.mean()) for name, v in known.items()}, "health_std": spreads}


def _drifts(now: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    spreads = base["health_std"]
    return {n: health_drift(n, mean, base["health"][n], spreads[n]) for n, mean in now["health"].items()}


def _generate(engine: Engine, request: Request, prompts: list[str], first: int, weights: Weights) -> Tensor:
    """Images `[P, K, 3, H, W]` of a stretch of the list that begins at prompt `first`."""
    seeds = [(request.seed + k) % (MAX_SEED + 1) for k in range(request.images_per_prompt)]
    generate = partial(
        engine.generate,
        prompts,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        weights=weights,
        first=first,
    )
    return torch.stack([generate(seed=seed) for seed in seeds], 1)


def _previews(images: Tensor) -> Tensor:
    factor = PREVIEW_SIDE / max(images.shape[-2:])
    if factor < 1:
        size = [max(1, round(n * factor)) for n in images.shape[-2:]]
        images = functional.interpolate(images, size, mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round().byte()
