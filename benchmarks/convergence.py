"""How fast and how far each algorithm trains, at equal images: held-out curves over seeds.

    python -m benchmarks.convergence --stage tune final option --seeds 0 1 2 3 4
    python -m benchmarks.convergence --task counting --stage tune final
    python -m benchmarks.convergence --task sd35m --stage tune final        # on a GPU

writes `benchmarks/results/evidence/convergence*.json`, trial by trial. Finished trials are not run again, and a killed
one goes on from its last evaluation: the same command continues. One thread; the work of an epoch is counted in images,
in network evaluations (forward 1, backward 2) and in seconds.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, evidence_files
from benchmarks.evidence_tasks import TASKS, Score, Task
from benchmarks.evidence_trials import Trial, final, options, tuning
from fdfo_engine.config import BatchPlan
from fdfo_engine.engine import Engine
from fdfo_engine.metrics import DIVERSITY, HEALTH, measure_health
from fdfo_engine.rollout.prompts import PromptList, load_prompts

PROGRAM = "python -m benchmarks.convergence"


def main() -> None:
    """Runs what is missing of the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="shapes")
    parser.add_argument("--stage", nargs="+", choices=["tune", "final", "option"], default=["tune", "final", "option"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="methods and options, by name; all if not given")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence", help="where unfinished runs lie")
    parser.add_argument("--out", type=Path, help="default: the task's file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[arguments.task]
    out = arguments.out or task.file
    for stage in arguments.stage:
        for trial in trials(task, stage, arguments.seeds, out):
            wanted = arguments.only is None or trial.method.removeprefix("fdfo+") in arguments.only
            if wanted and trial.name not in finished(out):
                folder = arguments.runs / arguments.task / trial.name
                keep(out, trial, Run(task, trial, folder).record())
                shutil.rmtree(folder)


def trials(task: Task, stage: str, seeds: list[int], out: Path) -> Iterator[Trial]:
    """The trials of a stage, in order; `final` and `option` need those of `tune`."""
    if stage == "tune":
        return tuning(task)
    return final(task, seeds, finished(out)) if stage == "final" else options(task, seeds, finished(out))


def finished(out: Path) -> dict[str, Any]:
    """Trials that are done, by name."""
    return evidence_files.kept(out, "trials")


def keep(out: Path, trial: Trial, record: dict[str, Any]) -> None:
    """Adds a finished trial to the file."""
    evidence_files.keep(out, PROGRAM, "trials", trial.name, trial.record() | record)
    last = record["curve"][-1]
    print(f"{trial.name}: held out {last['reward']:.4f}", flush=True)


@dataclass(frozen=True)
class Epoch:
    """Mean reward of the images, metrics of the update, and the velocities' size at each step against the base's."""

    reward: float
    update: dict[str, float]
    velocity_ratio: list[float]


class Run:
    """One trial of a task, in a folder."""

    def __init__(self, task: Task, trial: Trial, folder: Path) -> None:
        self._task = task
        self._config = trial.config(task, str(folder))
        self._score: Score = task.score()
        self._others = {name: make() for name, make in task.others.items()}
        self._prompts: PromptList = load_prompts(
            self._config.prompts, self._config.run.seed, pairs_per_prompt=self._config.sampling.pairs_per_prompt
        )

    def record(self) -> dict[str, Any]:
        """Trains to the end, from where it was interrupted; the curve and what it cost."""
        with Engine(self._config) as engine:
            if not engine.load():
                engine.notes = {"curve": [], "seconds": 0.0, "evaluations": 0, "base_velocity": None}
                self._evaluate(engine, [])
            while engine.epoch < self._config.run.epochs:
                self._evaluate(engine, [self._train(engine) for _ in range(self._task.evaluate_every)])
            return {key: engine.notes[key] for key in ("curve", "seconds", "evaluations")}

    def _train(self, engine: Engine) -> Epoch:
        """One epoch; its seconds and network evaluations are added to the engine's notes."""
        notes, plan = engine.notes, BatchPlan.from_config(self._config, 1)
        started = time.perf_counter()
        texts = self._prompts.of_pairs(range(engine.next_pair, engine.next_pair + plan.pairs_per_epoch))
        rollout = engine.rollout(texts)
        reward_PK = evidence_files.scored(self._score, texts, rollout)
        update = engine.update(rollout, reward_PK)
        notes["seconds"] += time.perf_counter() - started
        an_item = plan.training_evaluations // (plan.items_per_optimizer_step * plan.optimizer_steps)
        notes["evaluations"] += plan.sampling_evaluations + 3 * an_item * int(update["trained_items"])
        velocity_rms = rollout.velocities.float().square().flatten(3).mean((0, 1, 3)).sqrt().cpu()
        if notes["base_velocity"] is None:
            notes["base_velocity"] = velocity_rms.tolist()
        ratio = velocity_rms / torch.tensor(notes["base_velocity"])
        return Epoch(float(reward_PK.mean()), update, ratio.tolist())

    @torch.no_grad()
    def _evaluate(self, engine: Engine, epochs: list[Epoch]) -> None:
        """Adds a point to the curve, with the `epochs` since the one before, and saves it with the weights."""
        texts, seeds = self._task.held_out(), self._task.held_out_seeds
        images_PK = torch.stack([engine.generate(texts, seed=seed, weights="raw") for seed in range(seeds)], 1).cpu()
        repeated = [text for text in texts for _ in range(seeds)]
        images = images_PK.flatten(0, 1)
        health = measure_health(images, HEALTH)
        point = {
            "epoch": engine.epoch,
            "images": 2 * engine.next_pair,
            "evaluations": engine.notes["evaluations"],
            "seconds": round(engine.notes["seconds"], 2),
            "reward": float(self._score(repeated, images).mean()),
            **{name: float(score(repeated, images).mean()) for name, score in self._others.items()},
            "health": {name: float(values.mean()) for name, values in health.items()},
            "health_std": {name: float(values.std()) for name, values in health.items()},
            "diversity": {name: float(measure(images_PK).mean()) for name, measure in DIVERSITY.items()},
            "training_reward": [epoch.reward for epoch in epochs],
            "velocity_ratio": epochs[-1].velocity_ratio if epochs else None,
            "update": {
                key: [epoch.update[key] for epoch in epochs]
                for key in ("clip_fraction", "grad_norm", "log_ratio_largest")
            },
        }
        engine.notes["curve"].append(point)
        engine.save()


if __name__ == "__main__":
    main()
