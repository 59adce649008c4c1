"""Which runs the comparison of algorithms is made of: settings by name, in the order in which they are worth having.

All train the bundled shapes miniature with equal images, grid, optimizer and reward; what a trial names differs.
`tune` trials choose each method's learning rate on training prompts, with as many trials a method; `final` trials take
what was chosen, over seeds; `option` trials change one switch of FDFO.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import ROOT
from fdfo_engine.config import Config, load_config

CONFIG = ROOT / "configs" / "shapes.yaml"
TUNING_SEED = 100
EPOCHS, TUNING_EPOCHS = 30, 20
EVALUATE_EVERY = 10

COMMON = (
    "sampling.pairs_per_epoch=24", "update.ema=null", "checkpoint.keep=2", "evaluation.every=0",
    "log.tensorboard=false", "log.images_every=0", f"run.epochs={EPOCHS}",
)  # fmt: skip
GROUPS = ("sampling.pairs_per_prompt=4", "sampling.churn={schedule: raw, weight: 0.0025}")
"""Eight images a prompt; churn is FDFO's, and left at its default."""

METHODS: dict[str, tuple[str, ...]] = {
    "fdfo": (),
    "flow_grpo": ("algorithm={name: flow_grpo}", *GROUPS, "update.clip_range=1e-4"),
    "awm": ("algorithm={name: awm}", *GROUPS, "update.clip_range=1"),
    "nft": ("algorithm={name: nft}", *GROUPS),
}
"""Published settings on this grid; FDFO's are those of `configs/shapes.yaml`."""

LEARNING_RATES = (2e-4, 6e-4, 6e-5)
LAST_EPOCHS = 10

OPTIONS: dict[str, tuple[str, ...]] = {
    "keep_half": ("algorithm.keep_share=0.5",),
    "stratified": ("update.subset=stratified",),
    "two_pairs_a_prompt": ("sampling.pairs_per_prompt=2",),
    "spread": ("algorithm.advantage_scale=spread",),
    "churn_0.1": ("sampling.churn.weight=0.1",),
    "churn_0.3": ("sampling.churn.weight=0.3",),
    "antithetic": ("algorithm.branch_noise=antithetic",),
    "importance_half": ("algorithm.importance_share=0.5",),
}


@dataclass(frozen=True)
class Trial:
    """One run: a method or an option of FDFO, its seed, and the overrides of the config that it stands for."""

    name: str
    stage: str
    method: str
    seed: int
    overrides: tuple[str, ...]

    def config(self, folder: str) -> Config:
        return load_config(CONFIG, [*COMMON, *self.overrides, f"run.seed={self.seed}", f"run.dir={folder}"])

    def record(self) -> dict[str, Any]:
        return {
            "stage": self.stage, "method": self.method, "seed": self.seed, "overrides": [*COMMON, *self.overrides],
        }  # fmt: skip


def tuning() -> Iterator[Trial]:
    """Learning rates of every method, on one seed; two thirds of a final trial's length, for the time it takes."""
    for rate in LEARNING_RATES:
        changes = (f"optimizer.lr={rate}", f"run.epochs={TUNING_EPOCHS}")
        for method, overrides in METHODS.items():
            yield Trial(f"tune-{method}-lr{rate:g}", "tune", method, TUNING_SEED, (*overrides, *changes))


def chosen_rate(method: str, done: Mapping[str, Any]) -> float:
    """The learning rate whose `tune` trial had the best training reward over its last epochs."""
    reached = {rate: training_reward(done[f"tune-{method}-lr{rate:g}"]) for rate in LEARNING_RATES}
    return max(reached, key=reached.__getitem__)


def training_reward(record: Mapping[str, Any]) -> float:
    """Mean training reward of a trial's last epochs."""
    rewards = [reward for point in record["curve"] for reward in point["training_reward"]]
    return statistics.fmean(rewards[-LAST_EPOCHS:])


def final(seeds: Sequence[int], done: Mapping[str, Any]) -> Iterator[Trial]:
    """Every method at its chosen rate, seed by seed; `done` are the finished trials by name."""
    for seed in seeds:
        for method, overrides in METHODS.items():
            rate = f"optimizer.lr={chosen_rate(method, done)}"
            yield Trial(f"final-{method}-seed{seed}", "final", method, seed, (*overrides, rate))


def options(seeds: Sequence[int], done: Mapping[str, Any]) -> Iterator[Trial]:
    """FDFO with one switch changed, at the rate of FDFO."""
    for seed in seeds:
        for option, overrides in OPTIONS.items():
            rate = f"optimizer.lr={chosen_rate('fdfo', done)}"
            yield Trial(f"option-{option}-seed{seed}", "option", f"fdfo+{option}", seed, (*overrides, rate))
