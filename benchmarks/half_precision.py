"""How far training in bfloat16 and in float16 is from float32: `python -m benchmarks.half_precision`.

An epoch of the bundled model, with weights that moved, in each dtype, on fused blocks and on diffusers' own: the
difference of the images of a pair (`direction`), and the gradient of the LoRA, both against float32 on the same blocks
and noise, as norms. Rewards are drawn. On a CPU in minutes; a few gigabytes.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from fdfo_engine.bench.record import header, write
from fdfo_engine.config import Config, load_config
from fdfo_engine.engine import Engine
from fdfo_engine.rollout.prompts import load_prompts
from fdfo_engine.runtime.distributed import close_distributed

DTYPES = ("bfloat16", "float16")
GUIDANCE = (1.0, 4.5)
PAIRS = 16
MOVED = 0.02
"""Standard deviation of what is added to the LoRA's weights: a fresh one has no gradient for half of them."""


def measured(guidance: float, *, fused: bool) -> list[dict[str, Any]]:
    """One row for each of `DTYPES`."""
    exact = _epoch("float32", guidance, fused=fused)
    rows = []
    for dtype in DTYPES:
        found = _epoch(dtype, guidance, fused=fused)
        errors = {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
        rows.append({"dtype": dtype, "guidance_scale": guidance, "fused": fused, **errors})
    return rows


def _epoch(dtype: str, guidance: float, *, fused: bool) -> dict[str, Tensor]:
    """Direction of the pairs and gradient of one optimiser step over all of them, float64."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder, dtype, guidance, fused=fused)
        engine = Engine(config)
        generator = torch.Generator().manual_seed(0)
        moved = {n: w + MOVED * torch.randn(w.shape, generator=generator) for n, w in engine.trainer.weights().items()}
        engine.trainer.load(moved, engine.trainer.state())
        rollout = engine.rollout(load_prompts(config.prompts, config.run.seed).prompts[:PAIRS])
        rewards = torch.rand(PAIRS, 2, generator=generator)
        engine.primitives.forward_backward(rollout, rewards=rewards, parts=1)
        gradient = torch.cat([g.flatten() for g in engine.trainer.gradients().values()])
        engine.primitives.discard()
        close_distributed()
    return {"direction": rollout.direction.double().cpu(), "gradient": gradient.double()}


def _config(folder: str, dtype: str, guidance: float, *, fused: bool) -> Config:
    return load_config(
        "shapes",
        [
            f"run.dir={folder}", f"model.dtype={dtype}", f"model.fused={str(fused).lower()}",
            f"sampling.guidance_scale={guidance}", f"sampling.pairs_per_epoch={PAIRS}", "sampling.block_pairs=4",
        ],
    )  # fmt: skip


def main() -> None:
    """Writes `results/half_precision.json` and prints the table."""
    rows = [row for fused in (False, True) for guidance in GUIDANCE for row in measured(guidance, fused=fused)]
    write(RESULTS / "half_precision.json", header("benchmarks.half_precision") | {"rows": rows})
    print(f"{'blocks':8}{'guidance':>10}  {'dtype':10}{'direction':>11}{'gradient':>11}")
    for row in rows:
        blocks = "fused" if row["fused"] else "plain"
        numbers = f"{row['direction']:>11.1e}{row['gradient']:>11.1e}"
        print(f"{blocks:8}{row['guidance_scale']:>10}  {row['dtype']:10}{numbers}")


if __name__ == "__main__":
    main()
