"""How fast and how far each algorithm trains the shapes miniature, at equal images: held-out curves over seeds.

`python -m benchmarks.convergence --stage tune final option --seeds 0 1 2 3 4` writes
`benchmarks/results/evidence/convergence.json`, trial by trial. Finished trials are not run again, and a killed one
goes on from its last evaluation: the same command continues. One thread; the work of an epoch is counted in images,
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

from benchmarks import RESULTS, ROOT, evidence_files
from benchmarks.evidence_trials import EVALUATE_EVERY, Trial, final, options, tuning
from fdfo_engine.config import BatchPlan
from fdfo_engine.engine import Engine
from fdfo_engine.metrics import DIVERSITY, HEALTH, measure_health
from fdfo_engine.rewards.shapes import shapes, shapes_strict
from fdfo_engine.rollout.prompts import PromptList, load_prompts
from fdfo_engine.shapes.scene import captions

PROGRAM = "python -m benchmarks.convergence"
OUT = RESULTS / "evidence" / "convergence.json"
HELD_OUT_PROMPTS, HELD_OUT_SEEDS = 64, 4


def main() -> None:
    """Runs what is missing of the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=["tune", "final", "option"], default=["tune", "final", "option"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="methods and options, by name; all if not given")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence", help="where unfinished runs lie")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for stage in arguments.stage:
        for trial in trials(stage, arguments.seeds, arguments.out):
            wanted = arguments.only is None or trial.method.removeprefix("fdfo+") in arguments.only
            if wanted and trial.name not in finished(arguments.out):
                record = run(trial, arguments.runs / trial.name)
                keep(arguments.out, trial, record)
                shutil.rmtree(arguments.runs / trial.name)


def trials(stage: str, seeds: list[int], out: Path) -> Iterator[Trial]:
    """The trials of a stage, in order; `final` and `option` need those of `tune`."""
    if stage == "tune":
        return tuning()
    return final(seeds, finished(out)) if stage == "final" else options(seeds, finished(out))


def finished(out: Path) -> dict[str, Any]:
    """Trials that are done, by name."""
    return evidence_files.kept(out, "trials")


def keep(out: Path, trial: Trial, record: dict[str, Any]) -> None:
    """Adds a finished trial to the file."""
    evidence_files.keep(out, PROGRAM, "trials", trial.name, trial.record() | record)
    last = record["curve"][-1]
    print(f"{trial.name}: held out {last['reward']:.4f} strict {last['strict']:.4f}", flush=True)


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """The curve of one trial, from where it was interrupted."""
    config = trial.config(str(folder))
    with Engine(config) as engine:
        if not engine.load():
            engine.notes = {"curve": [], "seconds": 0.0, "evaluations": 0, "base_velocity": None}
            evaluate(engine, [])
        prompts = load_prompts(config.prompts, config.run.seed, pairs_per_prompt=config.sampling.pairs_per_prompt)
        while engine.epoch < config.run.epochs:
            evaluate(engine, [train(engine, prompts) for _ in range(EVALUATE_EVERY)])
        return {key: engine.notes[key] for key in ("curve", "seconds", "evaluations")}


@dataclass(frozen=True)
class Epoch:
    """Mean reward of the images, metrics of the update, and the velocities' size at each step against the base's."""

    reward: float
    update: dict[str, float]
    velocity_ratio: list[float]


def train(engine: Engine, prompts: PromptList) -> Epoch:
    """One epoch; its seconds and network evaluations are added to the engine's notes."""
    notes, plan = engine.notes, BatchPlan.from_config(engine.config, 1)
    started = time.perf_counter()
    texts = prompts.of_pairs(range(engine.next_pair, engine.next_pair + engine.config.sampling.pairs_per_epoch))
    rollout = engine.rollout(texts)
    reward_PK = evidence_files.scored(texts, rollout)
    update = engine.update(rollout, reward_PK)
    notes["seconds"] += time.perf_counter() - started
    silent = (update["tied_pairs"] + update["lost_pairs"] + update["zero_direction_pairs"]) / len(texts)
    notes["evaluations"] += plan.sampling_evaluations + 3 * round(plan.training_evaluations * (1 - silent))
    velocity_rms = rollout.velocities.square().flatten(3).mean((0, 1, 3)).sqrt()
    if notes["base_velocity"] is None:
        notes["base_velocity"] = velocity_rms.tolist()
    ratio = velocity_rms / torch.tensor(notes["base_velocity"])
    return Epoch(float(reward_PK.mean()), update, ratio.tolist())


@torch.no_grad()
def evaluate(engine: Engine, epochs: list[Epoch]) -> None:
    """Adds a point to the curve, with the `epochs` since the one before, and saves it with the weights."""
    texts = captions("heldout", HELD_OUT_PROMPTS, 0)
    images_PK = torch.stack([engine.generate(texts, seed=seed, weights="raw") for seed in range(HELD_OUT_SEEDS)], 1)
    repeated = [text for text in texts for _ in range(HELD_OUT_SEEDS)]
    images = images_PK.flatten(0, 1)
    health = measure_health(images, HEALTH)
    point = {
        "epoch": engine.epoch,
        "images": 2 * engine.next_pair,
        "evaluations": engine.notes["evaluations"],
        "seconds": round(engine.notes["seconds"], 2),
        "reward": float(shapes(repeated, images).mean()),
        "strict": float(shapes_strict(repeated, images).mean()),
        "health": {name: float(values.mean()) for name, values in health.items()},
        "health_std": {name: float(values.std()) for name, values in health.items()},
        "diversity": {name: float(measure(images_PK).mean()) for name, measure in DIVERSITY.items()},
        "training_reward": [epoch.reward for epoch in epochs],
        "velocity_ratio": epochs[-1].velocity_ratio if epochs else None,
        "update": {
            key: [epoch.update[key] for epoch in epochs] for key in ("clip_fraction", "grad_norm", "log_ratio_largest")
        },
    }
    engine.notes["curve"].append(point)
    engine.save()


if __name__ == "__main__":
    main()
