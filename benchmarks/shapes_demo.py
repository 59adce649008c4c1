"""What the demo achieves: held-out scores before and after, over seeds, beside as much CPU time of more pretraining.

`python -m benchmarks.shapes_demo --seeds 0 1 2 --pretraining` writes `benchmarks/results/<machine>/shapes_demo.json`.
A seed is one run of `configs/shapes.yaml` through the launcher; all start from the bundled base.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from fdfo_engine.bench.record import header, machine, write
from fdfo_engine.runtime.run_folder import read_log

CONFIG = ROOT / "configs" / "shapes.yaml"
METRICS = ("shapes", "shapes_strict")
PROBE_STEPS = 120
PICTURES = 20_000  # of another seed than the base's own


def main() -> None:
    """Runs the seeds, and the comparison if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pretraining", action="store_true", help="also train the base further for as much CPU time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench", help="where the runs go")
    parser.add_argument("--out", type=Path, default=RESULTS / machine(torch.device("cpu")) / "shapes_demo.json")
    parser.add_argument("overrides", nargs="*", help="section.key=value of the config")
    arguments = parser.parse_intermixed_args()
    runs = [train(seed, arguments.ranks, arguments.runs, arguments.overrides) for seed in arguments.seeds]
    result = header("python -m benchmarks.shapes_demo", sys.argv[1:]) | {
        "ranks": arguments.ranks,
        "seeds": runs,
        "summary": summary(runs),
    }
    if arguments.pretraining:
        cpu_seconds = arguments.ranks * result["summary"]["train_seconds"]
        result["further_pretraining"] = further_pretraining(cpu_seconds, arguments.runs)
    write(arguments.out, result)
    print(json.dumps({key: result.get(key) for key in ("summary", "further_pretraining")}, indent=1))


def train(seed: int, ranks: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run of the demo, or the rest of it; its evaluations and seconds."""
    run_dir, tools = folder / f"seed_{seed}", Path(sys.executable).parent
    command = [
        str(tools / "fdfo"), "train", "--ranks", str(ranks), "--config", str(CONFIG), f"run.dir={run_dir}",
        f"run.seed={seed}", *overrides,
    ]  # fmt: skip
    started = time.time()
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    epochs = read_log(run_dir / "metrics.jsonl")
    return {
        "seed": seed,
        "wall_seconds": round(time.time() - started, 1),
        "train_seconds": round(sum(epoch["seconds_total"] for epoch in epochs), 1),
        "epochs": len(epochs),
        "evaluations": [
            {key: line[key] for key in ("epoch", "count", "metrics", "metrics_stderr")}
            for line in read_log(run_dir / "evaluations.jsonl")
        ],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most over the seeds, of each metric before and after."""
    table: dict[str, Any] = {}
    for metric in METRICS:
        for when, index in (("before", 0), ("after", -1)):
            values = [run["evaluations"][index]["metrics"][metric] for run in runs]
            table[f"{metric}_{when}"] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    table["train_seconds"] = statistics.median(run["train_seconds"] for run in runs)
    return table


def further_pretraining(cpu_seconds: float, folder: Path) -> dict[str, Any]:
    """Held-out scores of the base after `cpu_seconds` on one thread of continued pretraining."""
    from fdfo_engine.shapes.pipeline import shapes_base
    from fdfo_engine.shapes.pretrain import Reporting, continue_pretraining

    torch.set_num_threads(1)
    reporting = Reporting(log_every=20, evaluate_every=10**9)
    probe, longer = folder / "pretraining_probe", folder / "pretraining"
    continue_pretraining(shapes_base(), probe, steps=PROBE_STEPS, pictures=1000, reporting=reporting)
    steps = max(1, int(cpu_seconds / seconds_a_step(probe)))
    continue_pretraining(shapes_base(), longer, steps=steps, pictures=PICTURES, reporting=reporting)
    taken = steps * seconds_a_step(longer)
    return {"cpu_seconds": taken, "steps": steps, "pictures": PICTURES, **evaluate_pipeline(longer, folder)}


def seconds_a_step(pipeline: Path) -> float:
    """Of the training alone: without drawing and encoding its pictures, and without the evaluation after the last."""
    lines = [json.loads(line) for line in (pipeline / "pretraining.jsonl").read_text().splitlines()]
    start = next(line["seconds"] for line in lines if line["stage"] == "cache")
    last = [line for line in lines if line["stage"] == "flow" and "score_8" not in line][-1]
    return float((last["seconds"] - start) / last["step"])


def evaluate_pipeline(pipeline: Path, folder: Path) -> dict[str, Any]:
    """The demo's own evaluation, before any training, of another pipeline folder."""
    from fdfo_engine.config import load_config
    from fdfo_engine.engine import Engine
    from fdfo_engine.evaluation import evaluate, evaluation_prompts, metric_rewards

    config = load_config(CONFIG, [f"model.id={pipeline}", f"run.dir={folder / 'evaluation'}"])
    engine, seed = Engine(config), config.evaluation.seed
    record = evaluate(engine, evaluation_prompts(config), metric_rewards(config), seed=seed).record(engine, "raw", seed)
    return {name: record[name] for name in ("metrics", "metrics_stderr")}


if __name__ == "__main__":
    main()
