"""Which runs the comparison of algorithms on a task is made of, in the order in which they are worth having.

All take the task's model, grid, optimizer, reward and equal images; what a trial names differs. `tune` trials choose
each method's learning rate on training prompts, with as many trials a method; `final` trials take what was chosen, over
seeds; `option` trials change one switch of FDFO.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence_tasks import Task
from fdfo_engine.config import Config, load_config

TUNING_SEED = 100
LAST_EPOCHS = 10


@dataclass(frozen=True)
class Trial:
    """One run: a method or an option of FDFO, its seed, and the overrides of the task's config that it stands for."""

    name: str
    stage: str
    method: str
    seed: int
    overrides: tuple[str, ...]

    def config(self, task: Task, folder: str) -> Config:
        return load_config(task.config, [*self.overrides, f"run.seed={self.seed}", f"run.dir={folder}"])

    def record(self) -> dict[str, Any]:
        return {"stage": self.stage, "method": self.method, "seed": self.seed, "overrides": self.overrides}


def tuning(task: Task) -> Iterator[Trial]:
    """Learning rates of every method, on one seed; shorter than a final trial, for the time it takes.

    A task with one rate has nothing to choose.
    """
    for rate in task.rates if len(task.rates) > 1 else ():
        for method, overrides in task.methods.items():
            changes = (*task.settings, f"run.epochs={task.tuning_epochs}", *overrides, f"optimizer.lr={rate}")
            yield Trial(f"tune-{method}-lr{rate:g}", "tune", method, TUNING_SEED, changes)


def chosen_rate(task: Task, method: str, done: Mapping[str, Any]) -> float:
    """The learning rate whose `tune` trial had the best training reward over its last epochs; a task's only one."""
    if len(task.rates) == 1:
        return task.rates[0]
    reached = {rate: training_reward(done[f"tune-{method}-lr{rate:g}"]) for rate in task.rates}
    return max(reached, key=reached.__getitem__)


def training_reward(record: Mapping[str, Any]) -> float:
    """Mean training reward of a trial's last epochs."""
    rewards = [reward for point in record["curve"] for reward in point["training_reward"]]
    return statistics.fmean(rewards[-LAST_EPOCHS:])


def final(task: Task, seeds: Sequence[int], done: Mapping[str, Any]) -> Iterator[Trial]:
    """Every method at its chosen rate, seed by seed; `done` are the finished trials by name."""
    for seed in seeds:
        for method, overrides in task.methods.items():
            changes = _whole(task, (*overrides, f"optimizer.lr={chosen_rate(task, method, done)}"))
            yield Trial(f"final-{method}-seed{seed}", "final", method, seed, changes)


def options(task: Task, seeds: Sequence[int], done: Mapping[str, Any]) -> Iterator[Trial]:
    """FDFO with one switch changed, at the rate of FDFO unless the option has its own."""
    for seed in seeds:
        for option, overrides in task.options.items():
            changes = _whole(task, (f"optimizer.lr={chosen_rate(task, 'fdfo', done)}", *overrides))
            yield Trial(f"option-{option}-seed{seed}", "option", f"fdfo+{option}", seed, changes)


def _whole(task: Task, overrides: tuple[str, ...]) -> tuple[str, ...]:
    return (*task.settings, f"run.epochs={task.epochs}", *overrides)
