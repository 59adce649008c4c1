"""A researcher's own loop on the primitives: group-relative advantages over the pairs of a prompt, PPO's clip.

    fdfo serve --config shapes run.dir=runs/grpo        (in another terminal)
    python examples/grpo_loop.py runs/grpo --epochs 3

Rewards and the loss are computed here, in the client; the server samples, replays trajectories and backpropagates
`sum of w * l`, where l is the log-ratio of each (sample, step).
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
from collections.abc import Callable

import numpy as np
from PIL import Image

from fdfo_engine.client import Client

Reward = Callable[[bytes, str], float]


def warmth(png: bytes, _prompt: str) -> float:
    """A reward to try with: how much redder than blue a picture is."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float64) / 255
    return float(pixels[..., 0].mean() - pixels[..., 2].mean())


def advantages(pairs: list[dict], scores: dict[int, list[float]]) -> dict[int, list[float]]:
    """Of each image: its score less the mean of its prompt's images, over the spread of all."""
    groups: dict[str, list[float]] = {}
    for pair in pairs:
        groups.setdefault(pair["prompt"], []).extend(scores[pair["pair_id"]])
    spread = statistics.pstdev([score for group in groups.values() for score in group]) + 1e-4
    return {
        pair["pair_id"]: [(s - statistics.fmean(groups[pair["prompt"]])) / spread for s in scores[pair["pair_id"]]]
        for pair in pairs
    }


def ppo_weights(log_ratios: dict, advantage: dict[int, list[float]], clip: float) -> dict[str, list[list[float]]]:
    """dL/dl of the mean of `max(-A rho, -A clip(rho, 1 - c, 1 + c))`, rho = exp(l)."""
    count = sum(len(steps) for branches in log_ratios.values() for steps in branches)

    def weight(ratio: float, a: float) -> float:
        rho = math.exp(ratio)
        is_clipped = rho > 1 + clip if a > 0 else rho < 1 - clip
        return 0.0 if is_clipped else -a * rho / count

    return {
        pair: [[weight(r, a) for r in steps] for steps, a in zip(branches, advantage[int(pair)], strict=True)]
        for pair, branches in log_ratios.items()
    }


def train(client: Client, reward: Reward, *, epochs: int, prompts: int, group: int, clip: float = 0.03) -> list[float]:
    """Trains; returns the mean reward of each epoch's images."""
    parts, means = client.capabilities()["parts"], []
    for _ in range(epochs):
        sampled = client.sample(count=prompts, copies=group // 2)
        pairs, name = sampled["pairs"], sampled["round"]
        scores = {p["pair_id"]: [reward(client.image(image), p["prompt"]) for image in p["images"]] for p in pairs}
        means.append(statistics.fmean([score for row in scores.values() for score in row]))
        wanted = advantages(pairs, scores)
        for part in range(parts):
            ratios = client.forward(name, part=part)["log_ratios"]
            client.forward_backward(name, weights=ppo_weights(ratios, wanted, clip), part=part)
            client.optim_step()
        client.snapshot()
    return means


def main() -> None:
    """Trains the served run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the served run's folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4, help="images a prompt; even")
    arguments = parser.parse_args()
    with Client.of_run(arguments.run) as client:
        print(train(client, warmth, epochs=arguments.epochs, prompts=arguments.prompts, group=arguments.group))  # noqa: T201


if __name__ == "__main__":
    main()
