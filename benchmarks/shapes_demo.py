"""What the demo achieves: held-out scores before and after, over seeds, beside as much CPU time of more pretraining.

Run from the repository root: `python -m benchmarks.shapes_demo --seeds 0 1 2 --pretraining`. Writes
`benchmarks/results/shapes_demo.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.environment import describe_environment
from fdfo_engine.runtime.run_folder import read_log

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "shapes.yaml"
METRICS = ("shapes", "shapes_strict")


def main() -> None:
    """Runs the seeds, and the comparison if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pretraining", action="store_true", help="also train the base further for as much CPU time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "shapes_demo.json")
    parser.add_argument("overrides", nargs="*", help="section.key=value of the config")
    arguments = parser.parse_args()
    runs = [train(seed, arguments.ranks, arguments.runs, arguments.overrides) for seed in arguments.seeds]
    result = header(arguments.overrides) | {"ranks": arguments.ranks, "seeds": runs, "summary": summary(runs)}
    if arguments.pretraining:
        seconds = statistics.mean(run["train_seconds"] for run in runs) * arguments.ranks
        result["further_pretraining"] = further_pretraining(seconds, arguments.runs)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


def train(seed: int, ranks: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    run_dir = folder / f"seed_{seed}"
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "fdfo_engine/train.py",
        "--config", str(CONFIG), f"run.dir={run_dir}", f"run.seed={seed}", *overrides,
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = time.time()
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path})
    wall = time.time() - started
    evaluations, epochs = read_log(run_dir / "evaluations.jsonl"), read_log(run_dir / "metrics.jsonl")
    return {
        "seed": seed,
        "wall_seconds": round(wall, 1),
        "train_seconds": round(sum(e["seconds_total"] for e in epochs), 1),
        "epochs": len(epochs),
        "evaluations": [{k: e[k] for k in ("epoch", "count", "metrics", "metrics_stderr")} for e in evaluations],
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
    code = (
        "import sys, json, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from fdfo_engine.shapes.pipeline import shapes_base\n"
        "from fdfo_engine.shapes.pretrain import continue_pretraining\n"
        "continue_pretraining(shapes_base(), Path(sys.argv[1]), steps=int(sys.argv[2]))\n"
    )
    probe_steps = 60
    started = time.time()
    out = folder / "pretraining"
    run_code(code, str(out), str(probe_steps))
    probe = pretraining_seconds(out)
    steps = max(1, int(probe_steps * cpu_seconds / probe))
    run_code(code, str(out), str(steps))
    scores = evaluate_folder(out, folder)
    return {"cpu_seconds": pretraining_seconds(out), "steps": steps, "wall_seconds": time.time() - started} | scores


def run_code(code: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def pretraining_seconds(out: Path) -> float:
    """Seconds of the flow training alone: drawing the pictures is left out, in its favour."""
    lines = [json.loads(line) for line in (out / "pretraining.jsonl").read_text().splitlines()]
    flow = [line["seconds"] for line in lines if line["stage"] == "flow"]
    return max(flow) - min(line["seconds"] for line in lines if line["stage"] == "cache") if flow else 0.0


def evaluate_folder(pipeline: Path, folder: Path) -> dict[str, Any]:
    """The demo's own evaluation, before any training, of another pipeline folder."""
    code = (
        "import sys, json\n"
        "from fdfo_engine.config import load_config\n"
        "from fdfo_engine.engine import Engine\n"
        "from fdfo_engine.evaluation import evaluate, evaluation_prompts, metric_rewards\n"
        "config = load_config('shapes', [f'model.id={sys.argv[1]}', f'run.dir={sys.argv[2]}'])\n"
        "engine = Engine(config)\n"
        "result = evaluate(engine, evaluation_prompts(config), metric_rewards(config), seed=config.evaluation.seed)\n"
        "print(json.dumps(result.record(engine, 'auto', config.evaluation.seed)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(pipeline), str(folder / "scratch")],
        check=True, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    record = json.loads(done.stdout.strip().splitlines()[-1])
    return {"metrics": record["metrics"], "metrics_stderr": record["metrics_stderr"]}


def header(overrides: list[str]) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": "python -m benchmarks.shapes_demo --seeds 0 1 2 --pretraining",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "environment": describe_environment(),
        "overrides": overrides,
    }


if __name__ == "__main__":
    main()
