"""What the algorithms are compared on: a config, a reward, held-out prompts, and settings by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from scipy import ndimage
from torch import Tensor

from benchmarks import RESULTS, ROOT
from benchmarks.evidence_grid import CELLS, cell_name
from fdfo_engine.rewards import build
from fdfo_engine.rewards.shapes import shapes, shapes_strict
from fdfo_engine.rollout.prompt_sets import starter_file
from fdfo_engine.shapes.scene import captions, parse

Score = Callable[[Sequence[str], Tensor], Tensor]
"""Scores `[N]` of N images `[N, 3, height, width]` in 0..1 for their prompts."""

CONFIGS = ROOT / "configs"
QUIET = (
    "update.ema=null", "checkpoint.keep=2", "evaluation.every=0", "log.tensorboard=false", "log.images_every=0",
    "kernels.tune=false",
)  # fmt: skip
CHROMA = 0.3
LEAST_AREA = 24
"""Pixels, of 4,096: less is grain."""


@dataclass(frozen=True)
class Task:
    """A comparison of algorithms on equal terms.

    Attributes:
        settings: overrides of `config` for all methods.
        methods: overrides by method: published settings on this grid, FDFO's being those of the config.
        rates: learning rates to choose from.
        epochs, tuning_epochs: of a run, and of one that chooses a rate.
        score: makes the reward, which may load a model.
        others: makes what is measured beside it on held-out images, by name.
        held_out: prompts that no run trains on; `held_out_seeds` images of each are drawn.
        options: overrides of FDFO by the name of the option.
        file: of its results.
    """

    config: Path
    settings: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]
    rates: tuple[float, ...]
    epochs: int
    tuning_epochs: int
    evaluate_every: int
    score: Callable[[], Score]
    held_out: Callable[[], list[str]]
    held_out_seeds: int
    file: Path
    others: Mapping[str, Callable[[], Score]] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def counted(prompts: Sequence[str], images: Tensor) -> Tensor:
    """1 where a picture has as many separate coloured spots as its caption has objects, less by their share of error.

    Looks at neither colour nor shape nor place: another program than the shapes judge, with quirks of its own.
    """
    pairs = zip(prompts, images.float().cpu(), strict=True)
    return torch.tensor([_share_counted(len(parse(prompt).objects), image) for prompt, image in pairs])


def _share_counted(wanted: int, image: Tensor) -> float:
    coloured = (image.amax(0) - image.amin(0)).numpy() > CHROMA
    labels, count = ndimage.label(coloured)
    areas = ndimage.sum_labels(coloured, labels, range(1, count + 1))
    found = sum(area >= LEAST_AREA for area in areas)
    return max(0.0, 1 - abs(found - wanted) / wanted)


def several_objects() -> list[str]:
    """Held-out captions that have something to count."""
    return [text for text in captions("heldout", 256, 0) if len(parse(text).objects) > 1][:64]


def starter_held_out() -> list[str]:
    """The lines of the prompt set `starter` that are not for training."""
    return [line for line in starter_file("heldout").read_text().splitlines() if line.strip()]


def _groups(pairs_per_prompt: int) -> tuple[str, ...]:
    """Groups of twice as many images; churn is FDFO's, and left at its default."""
    return (f"sampling.pairs_per_prompt={pairs_per_prompt}", "sampling.churn={schedule: raw, weight: 0.0025}")


def _methods(pairs_per_prompt: int) -> dict[str, tuple[str, ...]]:
    groups = _groups(pairs_per_prompt)
    return {
        "fdfo": (),
        "flow_grpo": ("algorithm={name: flow_grpo}", *groups, "update.clip_range=1e-4"),
        "awm": ("algorithm={name: awm}", *groups, "update.clip_range=1"),
        "nft": ("algorithm={name: nft}", *groups),
    }


def _grid() -> dict[str, tuple[str, ...]]:
    """FDFO's three choices, each made as FDFO does or otherwise."""
    return {
        cell_name((states, direction, pairing)): (
            f"algorithm={{name: ablation, states: {states}, direction: {direction}, pairing: {pairing}}}",
        )
        for states, direction, pairing in CELLS
    }


PUBLISHED_UPDATE = ("update.train_steps=8", "update.optimizer_steps=4", "update.clip_range=0.03")
"""Every step, four optimizer steps an epoch, and its clip range, as FDFO was published with."""

MINIATURE = Task(
    config=CONFIGS / "shapes.yaml",
    settings=("sampling.pairs_per_epoch=24", *QUIET),
    methods=_methods(4),
    rates=(2e-4, 6e-4, 6e-5),
    epochs=30,
    tuning_epochs=20,
    evaluate_every=10,
    score=lambda: shapes,
    others={"strict": lambda: shapes_strict},
    held_out=lambda: captions("heldout", 64, 0),
    held_out_seeds=4,
    file=RESULTS / "evidence" / "convergence.json",
    options={
        "keep_half": ("algorithm.keep_share=0.5",),
        "keep_quarter": ("algorithm.keep_share=0.25",),
        "churn_0.01": ("sampling.churn.weight=0.01",),
        "stratified": ("update.subset=stratified",),
        "two_pairs_a_prompt": ("sampling.pairs_per_prompt=2",),
        "spread": ("algorithm.advantage_scale=spread",),
        "churn_0.1": ("sampling.churn.weight=0.1",),
        "churn_0.3": ("sampling.churn.weight=0.3",),
        "antithetic": ("algorithm.branch_noise=antithetic",),
        "importance_half": ("algorithm.importance_share=0.5",),
        "every_step": ("update.train_steps=8",),
        "four_updates": ("update.optimizer_steps=4",),
        "clip_0.3": ("update.clip_range=0.3",),
        "published_update": PUBLISHED_UPDATE,
        "published_update_lr6e-05": (*PUBLISHED_UPDATE, "optimizer.lr=6e-5"),
        "keep_half_every_step": ("algorithm.keep_share=0.5", "update.train_steps=8"),
    },
)

TASKS: dict[str, Task] = {
    "shapes": MINIATURE,
    "counting": replace(
        MINIATURE,
        score=lambda: counted,
        others={"shapes": lambda: shapes},
        held_out=several_objects,
        file=RESULTS / "evidence" / "convergence_counting.json",
        options={},
    ),
    "grid": replace(
        MINIATURE,
        methods=_grid(),
        rates=(2e-4,),
        file=RESULTS / "evidence" / "convergence_grid.json",
        options={},
    ),
    "sd35m": Task(
        config=CONFIGS / "sd35m_fast.yaml",
        settings=QUIET,
        methods=_methods(12),
        rates=(3e-5, 3e-4, 1e-4),
        epochs=100,
        tuning_epochs=30,
        evaluate_every=10,
        score=lambda: build("pickscore", {}, "task sd35m"),
        held_out=starter_held_out,
        held_out_seeds=4,
        file=RESULTS / "evidence" / "convergence_sd35m.json",
    ),
}
"""What each is evidence of: `shapes` and `counting` of how methods learn on a miniature from a program that looks at
pixels; `grid` of which of FDFO's choices matter there; `sd35m` of how methods learn on Stable Diffusion 3.5 Medium from
PickScore, on a GPU."""
