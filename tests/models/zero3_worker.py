"""One epoch at ZeRO-3, every parameter split, with fused blocks or diffusers' own, against the same at stage 1."""

import sys
from pathlib import Path

import torch
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.models.fused import is_fused
from fdfo_engine.runtime.distributed import close_distributed
from fdfo_engine.runtime.process import end_process

REWARDS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.2], [1.0, 0.0]])
SPLIT_ALL = {"stage": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}


def epoch(folder, run_dir, zero, **model):
    engine = Engine(tiny_config(folder, run_dir, model={"max_sequence_length": 24} | model, zero=zero))
    if zero["stage"] == 3:
        assert is_fused(engine.model.network) == model["fused"]
        assert not any(p.numel() for p in engine.model.network.parameters()), "nothing is split: this tests nothing"
    rollout = engine.rollout(PROMPTS)
    metrics = engine.update(rollout, REWARDS)
    metrics = engine.update(rollout, REWARDS, allow_stale=True)
    return rollout.images, metrics["grad_norm"], engine.trainer.weights()


def main(folder, out, train, fused):
    images, norm, weights = epoch(folder, out / "plain", {"stage": 1}, train=train, fused=fused)
    for checkpointing in (False, True):
        settings = {"train": train, "fused": fused, "gradient_checkpointing": checkpointing}
        found = epoch(folder, out / f"split{checkpointing}", SPLIT_ALL, **settings)
        assert (found[0] - images).abs().max() < 1e-5
        assert abs(found[1] - norm) < 1e-4 * norm
        assert max((found[2][name] - w).abs().max() for name, w in weights.items()) < 1e-4


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "fused")
    close_distributed()
    end_process(0)
