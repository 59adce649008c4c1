"""How far independent batches of one algorithm agree on where the weights should go, at equal images.

`python -m benchmarks.variance` samples N independent batches at the bundled base, takes the gradient of each over all
trained items, and writes their inner products to `benchmarks/results/evidence/variance.json`: of the gradients as they
are, which few weights dominate, and of each weight's gradient divided by its root mean square over the batches, as
AdamW would scale it. From these: the cosine between independent batches; the cosine of a batch with the mean of the
others; and the signal-to-noise ratio `|E g|^2 / E|g - E g|^2`, unbiased. Batches that are done are kept under `--runs`,
so that the same command continues after a kill. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import RESULTS, ROOT, evidence_files
from benchmarks.evidence_tasks import TASKS
from fdfo_engine.config import load_config
from fdfo_engine.engine import Engine
from fdfo_engine.rollout.prompts import load_prompts

OUT = RESULTS / "evidence" / "variance.json"
RESAMPLINGS = 300
TASK = TASKS["shapes"]


def main() -> None:
    """Takes the gradients that are missing, and writes what all of them say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=12, help="of a batch; twice as many images")
    parser.add_argument("--only", nargs="+", default=list(TASK.methods), help="methods, by name")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "evidence" / "variance", help="where gradients lie"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for method in arguments.only:
        vectors, seconds = gradients(method, arguments.batches, arguments.pairs, arguments.runs)
        keep(arguments.out, method, arguments.pairs, summary(vectors, seconds))


def keep(out: Path, method: str, pairs: int, found: dict[str, Any]) -> None:
    """Adds a method to the file."""
    record = {"overrides": TASK.methods[method], "images_a_batch": 2 * pairs} | found
    evidence_files.keep(out, "python -m benchmarks.variance", "methods", method, record, config=TASK.config.name)
    print(f"{method}: signal to noise {found['gradient']['signal_to_noise']:.4f}", flush=True)


def gradients(method: str, batches: int, pairs: int, runs: Path) -> tuple[list[Tensor], list[float]]:
    """One vector a batch, and the seconds that each took."""
    folder = runs / f"{method}-{pairs}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"batch_{number:03d}.safetensors" for number in range(batches)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        take(method, missing, pairs, folder)
    saved = [load_file(path) for path in paths]
    return [batch["gradient"] for batch in saved], [float(batch["seconds"]) for batch in saved]


def take(method: str, numbers: list[int], pairs: int, folder: Path) -> None:
    """Samples the batches of these numbers, and writes their gradients."""
    config = load_config(
        TASK.config,
        [*TASK.methods[method], f"sampling.pairs_per_epoch={pairs}", "update.ema=null", f"run.dir={folder / 'run'}"],
    )
    prompts = load_prompts(config.prompts, config.run.seed, pairs_per_prompt=config.sampling.pairs_per_prompt)
    with Engine(config) as engine:
        for number in numbers:
            engine.next_pair = number * pairs
            started = time.perf_counter()
            gradient = one(engine, prompts.of_pairs(range(number * pairs, (number + 1) * pairs)))
            taken = torch.tensor([time.perf_counter() - started])
            partial = folder / f"batch_{number:03d}.partial"
            save_file({"gradient": gradient, "seconds": taken}, partial)
            partial.rename(partial.with_suffix(".safetensors"))


def one(engine: Engine, texts: list[str]) -> Tensor:
    """The gradient of a batch over all its trained items, on the CPU; the weights stay as they are."""
    rollout = engine.rollout(texts)
    engine.primitives.forward_backward(rollout, rewards=evidence_files.scored(TASK.score(), texts, rollout), parts=1)
    vector = torch.cat([gradient.flatten().float() for gradient in engine.trainer.gradients().values()])
    engine.primitives.discard()
    return vector


def summary(vectors: list[Tensor], seconds: list[float]) -> dict[str, Any]:
    """What the inner products say of the gradients as they are, and of what AdamW makes of their scale."""
    stacked = torch.stack(vectors)
    root_mean_square = stacked.square().mean(0).sqrt().clamp_min(1e-12)
    return {
        "gradient": agreement(stacked),
        "scaled": agreement(stacked / root_mean_square),
        "batches": len(vectors),
        "median_seconds_a_batch": statistics.median(seconds),
    }


def agreement(stacked: Tensor) -> dict[str, Any]:
    """Of vectors `[N, E]`, with 90 % intervals of what does not depend on N."""
    products = stacked.double() @ stacked.double().T
    return {
        "cosine": mean_cosine(products),
        "cosine_interval_90": interval(products, mean_cosine),
        "signal_to_noise": signal_to_noise(products),
        "signal_to_noise_interval_90": interval(products, signal_to_noise),
        "cosine_with_the_others_mean": leave_one_out(products),
        "inner_products": products.tolist(),
    }


def mean_cosine(products: Tensor) -> float:
    """Mean cosine of different batches."""
    norms = products.diagonal().sqrt()
    return float(_off_diagonal(products / norms[:, None] / norms[None]).mean())


def leave_one_out(products: Tensor) -> float:
    """Mean cosine of a batch with the mean of the others."""
    count = len(products)
    with_others = (products.sum(1) - products.diagonal()) / (count - 1)
    others = (products.sum() - 2 * products.sum(1) + products.diagonal()) / (count - 1) ** 2
    return float((with_others / (products.diagonal() * others).sqrt()).mean())


def signal_to_noise(products: Tensor) -> float:
    """`|E g|^2 / E|g - E g|^2`: different batches give the first without bias, and the same one the sum of both."""
    signal = float(_off_diagonal(products).mean())
    return signal / (float(products.diagonal().mean()) - signal)


def interval(products: Tensor, of: Callable[[Tensor], float]) -> list[float]:
    """5 % and 95 % of `of` over halves of the batches.

    The mean of a half, drawn without replacement, is as far from the mean of all as that is from the truth. With
    replacement a batch would meet itself.
    """
    count = len(products)
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randperm(count, generator=generator)[: count // 2] for _ in range(RESAMPLINGS))
    values = torch.tensor([of(products[rows][:, rows]) for rows in draws], dtype=torch.float64)
    return torch.quantile(values, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


if __name__ == "__main__":
    main()
