"""Three epochs with replayed rewards on the ranks there are; rank 0 writes what happened.

deepspeed --num_gpus 2 zero_worker.py PIPELINE OUT STAGE TRAIN [algorithm=NAME] [OFFLOADED ...], or by torchrun
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_sd3 import tiny_config

from fdfo_engine import Engine, load_config
from fdfo_engine.runtime.distributed import all_gather_rows, barrier, close_distributed, is_main
from fdfo_engine.runtime.process import end_process

PAIRS = 6
PROMPTS = [
    "a red circle",
    "two blue triangles",
    "a cyan triangle",
    "a green square",
    "a red triangle",
    "three red squares",
]
REWARDS = (
    [[3.0, 1.0], [-2.0, 4.0], [0.5, 0.5], [1.0, 0.0], [0.0, 2.5], [2.0, 1.0]],
    # all pairs of the last rank tie, of two as of three
    [[3.0, 1.0], [0.0, 1.0], [4.0, 0.5], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]],
    [[0.0, 1.0], [float("nan"), 4.0], [0.5, 0.0], [1.0, 3.0], [0.0, 2.5], [2.0, 1.0]],
)


GROUPS = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
"""Of two ranks each has half of the middle one."""


def config_of(pipeline, out, stage, train="lora", algorithm="fdfo", **zero):
    """Of a tiny pipeline's folder, or of the bundled `shapes`, as its own config trains it."""
    if str(pipeline) == "shapes":
        settings = {"run.dir": Path(out) / "run", "zero.stage": stage, "model.train": train, "update.ema": "null",
                    "sampling.pairs_per_epoch": PAIRS, "sampling.block_pairs": 1}  # fmt: skip
        return load_config("shapes", [f"{key}={value}" for key, value in settings.items()])
    if stage == 3:  # DeepSpeed leaves small weights whole, and here all are small
        zero["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    # 5 does not divide a block's items: micro-batches end at the block's border, or ranks would differ by 4e-6
    own_noise = {"schedule": "raw", "weight": 0.0025}  # its default: churn is FDFO's
    groups = {} if algorithm == "fdfo" else {"pairs_per_prompt": 2, "churn": own_noise}
    return tiny_config(
        Path(pipeline), Path(out) / "run", zero={"stage": stage, **zero}, model={"train": train},
        update={"micro_batch": 5}, sampling={"pairs_per_epoch": PAIRS, "block_pairs": 1, **groups},
        optimizer={"max_grad_norm": 0.05}, algorithm={"name": algorithm},
    )  # fmt: skip


def trace(pipeline, out, stage, train="lora", algorithm="fdfo", **zero):
    """Latents of the first epoch, its first unclipped gradients, and the weights before and after three epochs."""
    engine = Engine(config_of(pipeline, out, stage, train, algorithm, **zero))
    tensors = {f"start.{n}": w for n, w in engine.trainer.weights().items()}
    step = engine.trainer.step

    def watched():
        if not any(name.startswith("gradient.") for name in tensors):
            tensors.update({f"gradient.{n}": g for n, g in engine.trainer.gradients().items()})
        return step()

    engine.trainer.step = watched
    for epoch, rewards in enumerate(REWARDS):
        rollout = engine.rollout(PROMPTS if algorithm == "fdfo" else GROUPS)
        if epoch == 0:
            rows, T = torch.arange(len(rollout.prompts)), rollout.steps
            for k in (0, T // 2, T):
                for branch in range(2):
                    own = rollout.latents(rows, torch.full_like(rows, branch), torch.full_like(rows, k))
                    tensors[f"latents.{branch}.{k}"] = all_gather_rows(own)
        metrics = engine.update(rollout, torch.tensor(rewards))
        assert (metrics["optimizer_steps"], metrics["weights_changed"]) == (2, 1), metrics
    tensors |= {f"weights.{n}": w for n, w in engine.trainer.weights().items()}
    tensors |= {f"moments.{n}": s for n, s in engine.trainer.state().items()}
    engine.save()
    if is_main():
        save_file(tensors, Path(out) / "trace.safetensors")
    barrier("the end")


if __name__ == "__main__":
    pipeline, out, stage, train, *more = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    options = dict(word.split("=") if "=" in word else (word, True) for word in more)
    try:
        trace(pipeline, out, int(stage), train, **options)
    finally:
        close_distributed()  # an error must end in its own traceback, not in gloo's abort
    end_process(0)
