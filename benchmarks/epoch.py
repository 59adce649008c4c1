"""An epoch of the shapes run with frozen weights, on plain torch and on the kernels: same images, time in the pair ops.

`python -m benchmarks.epoch` writes `benchmarks/results/<machine>/epoch.json`. Both engines take turns, epoch by epoch,
with the same pairs and the rewards of the first. The learning rate is below what moves a float32 weight.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fdfo_engine.engine as engine_module
import fdfo_engine.rollout.sampler as sampler_module
import fdfo_engine.trajectory.rollout as rollout_module
import fdfo_engine.update.objective as objective_module
from benchmarks import RESULTS, ROOT
from fdfo_engine import Engine, load_config
from fdfo_engine.bench.record import header, machine, write
from fdfo_engine.rewards import shapes as reward
from fdfo_engine.shapes.scene import captions

FROZEN = 1e-30
CALLED_BY = {
    "paired_noise": sampler_module,
    "paired_step": sampler_module,
    "pair_direction": engine_module,
    "replay": rollout_module,
    "fdfo_loss": objective_module,
}


def main() -> None:
    """Runs the epochs, prints and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plain, fast = Candidate("torch"), Candidate("auto")
    agreements = []
    for epoch in range(arguments.epochs):
        texts = captions("train", plain.config.sampling.pairs_per_epoch, epoch)
        samples = [candidate.sample(texts) for candidate in (plain, fast)]
        agreements.append(agreement(*samples))
        for candidate in (plain, fast):
            candidate.train(samples[0]["rewards"])
    assert max(a["latents"] for a in agreements) <= 1e-3, "the kernels sample other latents than plain torch"
    result = header("python -m benchmarks.epoch", sys.argv[1:]) | {
        "threads": arguments.threads,
        "epochs": arguments.epochs,
        "agreement": {
            "latents_max_difference": max(a["latents"] for a in agreements),
            **{name: statistics.mean(a[name] for a in agreements) for name in agreements[0] if name != "latents"},
        },
        "candidates": {candidate.engine.backend: candidate.summary() for candidate in (plain, fast)},
        "trajectory": fast.trajectory_bytes(),
    }
    print(result["agreement"], result["candidates"], result["trajectory"], sep="\n")
    write(arguments.out or RESULTS / machine(fast.engine.device) / "epoch.json", result)


class Candidate:
    """One engine, and what its epochs took; seconds by op and in all."""

    def __init__(self, backend: str) -> None:
        settings = [f"kernels.backend={backend}", f"optimizer.lr={FROZEN}", "run.dir=runs/epoch-benchmark"]
        self.config = load_config(ROOT / "configs" / "shapes.yaml", settings)
        self.engine = Engine(self.config)
        self.seconds: list[dict[str, float]] = []

    def sample(self, texts: list[str]) -> dict[str, Any]:
        """The rollout of an epoch, its latents at every step and its rewards `[P, 2]`."""
        self.seconds.append(defaultdict(float))
        with timed(self.seconds[-1]), clock(self.seconds[-1], "rollout"):
            self.rollout = self.engine.rollout(texts)
        images = self.rollout.images.flatten(0, 1)
        scores = reward.shapes([text for text in texts for _ in range(2)], images).view(-1, 2)
        grid = (torch.arange(n) for n in (len(texts), 2, self.rollout.steps + 1))
        return {"latents": self.rollout.latents(*torch.cartesian_prod(*grid).unbind(1)), "rewards": scores}

    def train(self, rewards: Tensor) -> None:
        """The update of the epoch."""
        with timed(self.seconds[-1]), clock(self.seconds[-1], "update"):
            self.engine.update(self.rollout, rewards)

    def summary(self) -> dict[str, Any]:
        """Medians over the epochs, and the share of the pair ops in an epoch."""
        table: dict[str, Any] = {
            f"{name}_s": statistics.median(epoch[name] for epoch in self.seconds) for name in self.seconds[0]
        }
        table["pair_ops_s"] = sum(table[f"{name}_s"] for name in (*CALLED_BY, "fdfo_loss backward"))
        table["pair_ops_share"] = table["pair_ops_s"] / (table["rollout_s"] + table["update_s"])
        return table

    def trajectory_bytes(self) -> dict[str, int]:
        """Bytes kept for an epoch's trajectories, in this run's dtype and in bfloat16, and if x were kept too."""
        values = self.rollout.velocities.numel()
        latents = values // self.rollout.steps * (self.rollout.steps + 1)
        return {
            "velocities": self.rollout.velocities.nbytes,
            "velocities_bfloat16": 2 * values,
            "velocities_bfloat16_and_latents_float32": 2 * values + 4 * latents,
        }


def agreement(plain: dict[str, Tensor], fast: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of a latent of any step; shares of trajectories and of rewards that agree.

    Noise differs by 5e-7 between them, and the model makes more of it step by step.
    """
    apart = (plain["latents"] - fast["latents"]).abs()
    rewards = (plain["rewards"] - fast["rewards"]).abs().double()
    worst = apart.view(rewards.numel(), -1).max(1).values.double()
    return {
        "latents": float(apart.max()),
        "trajectories_within_1e-4": float((worst <= 1e-4).double().mean()),
        "rewards_equal": float((rewards == 0).double().mean()),
        "rewards_within_1e-3": float((rewards <= 1e-3).double().mean()),
    }


@contextmanager
def clock(into: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of its block to `into[name]`."""
    started = time.perf_counter()
    yield
    into[name] += time.perf_counter() - started


@contextmanager
def timed(into: dict[str, float]) -> Iterator[None]:
    """Every pair op that the engine calls in its block adds its seconds to `into`; the loss also its backward's."""
    with ExitStack() as stack:
        for name, module in CALLED_BY.items():
            stack.enter_context(mock.patch.object(module, name, clocked(into, name, getattr(module, name))))
        yield


def clocked(into: dict[str, float], name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with a clock."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock(into, name):
            out = op(*args, **kwargs)
        if name == "fdfo_loss":
            watch_backward(into, out[0], args[0])
        return out

    return call


def watch_backward(into: dict[str, float], loss: Tensor, v: Tensor) -> None:
    """Times the loss's backward: what is between the gradient of `loss` and that of `v`."""
    backward = clock(into, "fdfo_loss backward")

    def begin(_: Tensor) -> None:
        backward.__enter__()

    def end(_: Tensor) -> None:
        backward.__exit__(None, None, None)

    loss.register_hook(begin)
    v.register_hook(end)


if __name__ == "__main__":
    main()
