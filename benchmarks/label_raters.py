"""Simulated raters train the shapes miniature through the HTTP API: does the model move their way, and by which rule?

    python -m benchmarks.label_raters
    python -m benchmarks.label_raters --raters judge --seeds 0 1

Three raters choose between the two pictures of each pair, ten rounds of 48: `warm` likes warm colours, `judge` agrees
with the shapes judge, `noisy` is `judge` with a tenth of the clicks at random. Three rules about pairs that are hard to
tell apart: none, `keep: {of: 2, by: distance}`, `labels.scale: distance`. Then base and trained model draw the same
held-out prompts from the same noise, and the rater's own taste (without its random clicks) is measured on both.
Writes `benchmarks/results/label_raters.json` run by run; the same command runs what is missing.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import RESULTS, evidence_files
from fdfo_engine import load_config
from fdfo_engine.client import Client
from fdfo_engine.metrics import t_interval
from fdfo_engine.rewards.shapes import shapes
from fdfo_engine.runtime.errors import Stopped
from fdfo_engine.runtime.stop import StopRequest
from fdfo_engine.serve.address import ADDRESS_NAME
from fdfo_engine.serve.server import Door, serve

PROGRAM = "python -m benchmarks.label_raters"
OUT = RESULTS / "label_raters.json"
ROUNDS, ROUND_SIZE, HELD_OUT = 10, 48, 128
LEARNING_RATE = 4e-4
RANDOM_CLICKS = 0.1
RULES: dict[str, Mapping[str, str]] = {
    "none": {"labels.keep.of": "1"},
    "keep": {"labels.keep.of": "2"},
    "scale": {"labels.keep.of": "1", "labels.scale": "distance"},
}
SETTINGS = (
    f"sampling.pairs_per_epoch={ROUND_SIZE}", f"labels.round_size={ROUND_SIZE}", f"optimizer.lr={LEARNING_RATE}",
    "evaluation.every=0", "log.tensorboard=false", "log.images_every=0", "checkpoint.keep=2", "update.ema=null",
)  # fmt: skip
Scores = Callable[[list[str], torch.Tensor], list[float]]


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raters", nargs="+", choices=[*TASTES], default=[*TASTES])
    parser.add_argument("--rules", nargs="+", choices=[*RULES], default=[*RULES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for rater in arguments.raters:
            for rule in arguments.rules:
                name = f"{rater}/{rule}/{seed}"
                if name in evidence_files.kept(arguments.out, "runs"):
                    continue
                with tempfile.TemporaryDirectory(prefix="label-raters-") as folder:
                    record = trained(Path(folder) / "run", rater, rule, seed, arguments.rounds)
                evidence_files.keep(arguments.out, PROGRAM, "runs", name, record)
                print(f"{name}: {record['base']:.4f} -> {record['tuned']:.4f}, {record['seconds']:.0f} s", flush=True)
    print(table(evidence_files.kept(arguments.out, "runs")))


def trained(folder: Path, rater: str, rule: str, seed: int, rounds: int) -> dict[str, Any]:
    """One run: ten rounds of choices, then the rater's taste on held-out pictures of base and trained model."""
    overrides = [f"run.dir={folder}", f"run.seed={seed}", *SETTINGS]
    overrides += [f"{key}={value}" for key, value in RULES[rule].items()]
    config = load_config("shapes", overrides)
    chance, taste = random.Random(f"{rater} {seed}"), TASTES[rater]
    started, ties = time.perf_counter(), 0
    with served(config) as client:
        for _ in range(rounds):
            name = client.create_round(count=ROUND_SIZE, keep=config.labels.keep.model_dump())["round"]
            choices = choose(client, name, rater, taste, chance)
            ties += sum(judgement["choice"] == "tie" for judgement in choices)
            client.feedback(name, choices, rater=rater)
            client.train(name)
        base, tuned = held_out(client, taste)
    gain = t_interval([after - before for before, after in zip(base, tuned, strict=True)])
    return {
        "rater": rater, "rule": rule, "seed": seed, "rounds": rounds, "round_size": ROUND_SIZE, "lr": LEARNING_RATE,
        "base": float(np.mean(base)), "tuned": float(np.mean(tuned)), "gain": gain.mean, "low": gain.low,
        "high": gain.high, "held_out": HELD_OUT, "ties": ties, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def choose(client: Client, name: str, rater: str, taste: Scores, chance: random.Random) -> list[dict[str, Any]]:
    """What the rater says of every pair of a round, by what is on the screen alone."""
    pairs = client.pairs(name, rater=rater)
    prompts = [pair["prompt"] for pair in pairs]
    left, right = (taste(prompts, pictures(client, [pair[side] for pair in pairs])) for side in ("left", "right"))
    judgements = []
    for pair, one, other in zip(pairs, left, right, strict=True):
        choice = "tie" if one == other else "left" if one > other else "right"
        if rater == "noisy" and chance.random() < RANDOM_CLICKS:
            choice = chance.choice(["left", "right"])
        judgements.append({"pair_id": pair["pair_id"], "choice": choice, "ms": 2000})
    return judgements


def held_out(client: Client, taste: Scores) -> tuple[list[float], list[float]]:
    """The taste on pictures of the untrained and of the trained model: the same prompts, the same noise."""
    pairs = client.compare(count=HELD_OUT)["pairs"]
    prompts = [pair["prompt"] for pair in pairs]
    base, tuned = (taste(prompts, pictures(client, [pair["images"][branch] for pair in pairs])) for branch in range(2))
    return base, tuned


def pictures(client: Client, images: list[str]) -> torch.Tensor:
    """`[N, 3, H, W]` in 0..1 of the PNG files that a client gets."""
    arrays = [np.asarray(Image.open(io.BytesIO(client.image(image))).convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def warmth(_prompts: list[str], images: torch.Tensor) -> list[float]:
    """Red less blue, mean over the picture."""
    return (images[:, 0] - images[:, 2]).mean((1, 2)).tolist()


def judged(prompts: list[str], images: torch.Tensor) -> list[float]:
    """The share of the caption's facts that the picture shows."""
    return shapes(prompts, images).tolist()


TASTES: dict[str, Scores] = {"judge": judged, "noisy": judged, "warm": warmth}


@contextmanager
def served(config: Any) -> Iterator[Client]:
    """A client of a server in a thread of this process."""
    stop = StopRequest()

    def run() -> None:
        with suppress(Stopped):
            serve(config, Door(port=0), stop)

    thread = threading.Thread(target=run, name="engine")
    thread.start()
    folder = Path(config.run.dir)
    try:
        while not (folder / ADDRESS_NAME).is_file():
            assert thread.is_alive(), "the server ended"
            time.sleep(0.05)
        with Client.of_run(folder, patience_s=600.0) as client:
            client.ready()
            yield client
    finally:
        stop.reason = "the run is over"
        thread.join()


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each rater and rule: the gain, mean over seeds with Student's interval."""
    lines = [f"{'rater':8} {'rule':8} {'seeds':>5} {'base':>8} {'tuned':>8} {'gain':>8}  95% interval"]
    for rater in TASTES:
        for rule in RULES:
            of_rule = [run for run in runs.values() if (run["rater"], run["rule"]) == (rater, rule)]
            if not of_rule:
                continue
            gain = t_interval([run["gain"] for run in of_rule])
            base, tuned = (float(np.mean([run[key] for run in of_rule])) for key in ("base", "tuned"))
            span = f"{gain.low:+.4f} to {gain.high:+.4f}" if len(of_rule) > 1 else "one seed"
            lines.append(f"{rater:8} {rule:8} {len(of_rule):5} {base:8.4f} {tuned:8.4f} {gain.mean:+8.4f}  {span}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
