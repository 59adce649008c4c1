"""A whole epoch of the engine against the same epoch in float64, written from METHOD."""

import pytest
import torch
from tiny_sd3 import tiny_config
from update.epoch_oracle import EpochOracle

from fdfo_engine import Engine

NAN = float("nan")
PROMPTS = ["a red circle", "two blue dogs", "one cat", "a green square", "a red circle"]
REWARDS = [[3.0, 1.0], [-2.0, 4.0], [0.5, 0.5], [NAN, 1.0], [0.0, 2.5]]

CASES = {
    "lora": {},
    "lora, guided": {"sampling": {"guidance_scale": 4.5}},
    "full": {"model": {"train": "full"}},
    "full, guided, clipped": {
        "model": {"train": "full"}, "sampling": {"guidance_scale": 4.5}, "optimizer": {"max_grad_norm": 0.05},
    },
    "half of the steps": {"update": {"train_steps": 2}},
    "kl": {"update": {"kl_weight": 0.3}},
    "velocity hinge": {"update": {"velocity_hinge": 30.0}},
    "kl, full": {"model": {"train": "full"}, "update": {"kl_weight": 0.3, "kl_reference": "frozen_copy"}},
}  # fmt: skip


def total_norm(tensors):
    return torch.stack([t.double().norm() for t in tensors]).norm().item()


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_is_the_methods(tiny_sd3, tmp_path, case):
    sections = {"optimizer": {}, "sampling": {}, "update": {}, **CASES[case]}
    # eps near the gradients' size: AdamW then keeps their relative accuracy instead of the sign of rounding errors
    optimizer = {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.02, **sections.pop("optimizer")}
    sampling = {"pairs_per_epoch": 5, "block_pairs": 2, "steps": 4, **sections.pop("sampling")}
    config = tiny_config(tiny_sd3, tmp_path, optimizer=optimizer, sampling=sampling, **sections)
    engine = Engine(config)
    generator = torch.Generator().manual_seed(3)
    start = engine.trainer.weights()
    if config.model.train == "lora":  # B = 0 would hide half of the gradients
        start = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in start.items()}
        engine.trainer.load(start, engine.trainer.state())
    oracle = EpochOracle(config, {n: w.clone() for n, w in start.items()})

    rollout = engine.rollout(PROMPTS)
    oracle.sample(PROMPTS)
    assert (rollout.images - oracle.images()).abs().max() < 2e-5
    metrics = engine.update(rollout, torch.tensor(REWARDS))
    oracle.update(REWARDS)

    assert metrics["optimizer_steps"] == 2
    assert (metrics["lost_pairs"], metrics["tied_pairs"]) == (1, 1)
    assert metrics["grad_norm"] == pytest.approx(sum(oracle.grad_norms) / 2, rel=1e-4)
    assert max(oracle.grad_norms) > optimizer["max_grad_norm"], "the case is meant to clip"
    assert metrics["loss"] == pytest.approx(oracle.loss, rel=1e-3, abs=1e-7)
    weights = engine.trainer.weights()
    change = total_norm(oracle.weights[n].detach() - start[n].double() for n in start)
    error = total_norm(weights[n].double() - oracle.weights[n].detach() for n in start)
    assert change > 1e-2
    assert error < 1e-4 * change + 1e-7 * total_norm(weights.values())
