"""One epoch of Stable Diffusion 3.5 Medium at its real size, with random weights, so that real sizes are met anywhere.

    python -m benchmarks.real_size
    python -m benchmarks.real_size --image 512 --pairs 2 --steps 4

Builds a pipeline folder with the real transformer and VAE; T5 is left out, and both CLIPs have their real widths but
two layers. Then `fdfo train` runs an epoch of it in bfloat16 in a process of its own. On a CPU that takes minutes and
about 12 GB. Pictures of random weights are noise: what is met is memory, shapes, time, and that nothing becomes NaN.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks import RESULTS, ROOT
from fdfo_engine.bench.architectures import architectures
from fdfo_engine.bench.record import header, machine, write

CLIPS = {"text_encoder": (768, 3072), "text_encoder_2": (1280, 5120)}
"""Widths of CLIP L and CLIP bigG, and of their layers' inner products."""

PROMPTS = ("a red circle", "two blue dogs", "a green square", "one cat")


def main() -> None:
    """Builds, trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=256, help="height and width of the images")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--deepspeed", action="store_true", help="by DeepSpeed's launcher, on one GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="real-size-") as name:
        folder = Path(name)
        parameters = build(folder / "pipeline")
        found = train(folder, arguments)
    result = header("python -m benchmarks.real_size", sys.argv[1:]) | {"transformer_parameters": parameters} | found
    print(json.dumps(result, indent=1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write(arguments.out or RESULTS / machine(device) / "real_size.json", result)


def build(folder: Path) -> int:
    """Saves the pipeline; returns how many parameters its transformer has."""
    torch.manual_seed(0)
    medium = architectures()["sd35-medium"]
    torch.set_default_dtype(torch.bfloat16)
    transformer = medium.kind(**medium.config)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    texts: dict[str, Any] = {name: clip(*widths) for name, widths in CLIPS.items()}
    torch.set_default_dtype(torch.float32)
    tokenizers = {name.replace("text_encoder", "tokenizer"): tokenizer() for name in CLIPS}
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder_3=None,
        tokenizer_3=None, **texts, **tokenizers,
    ).save_pretrained(folder)  # fmt: skip
    return sum(parameter.numel() for parameter in transformer.parameters())


def clip(width: int, inner: int) -> CLIPTextModelWithProjection:
    """A text encoder of two layers."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary()), hidden_size=width, projection_dim=width, intermediate_size=inner,
            num_hidden_layers=2, num_attention_heads=width // 64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def vocabulary() -> list[str]:
    """A token a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]


def tokenizer() -> CLIPTokenizer:
    """Of `vocabulary`."""
    found = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary())}, merges=[])
    found.model_max_length = 77
    return found


def train(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One epoch by `fdfo train`: its seconds, its highest memory, and the metrics that tell whether it computed."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    tree = {
        "run": {"dir": str(folder / "run"), "epochs": 1},
        "model": {
            "id": str(folder / "pipeline"), "dtype": "bfloat16", "height": arguments.image, "width": arguments.image,
            "max_sequence_length": 0,
        },
        "lora": {"rank": 32, "alpha": 64},
        "prompts": {"source": str(folder / "prompts.txt")},
        "sampling": {"pairs_per_epoch": arguments.pairs, "block_pairs": 1, "steps": arguments.steps},
        "rewards": [{"name": "brightness", "weight": 1.0}],
        "update": {"optimizer_steps": 1, "micro_batch": 2},
        "evaluation": {"every": 0},
        "log": {"tensorboard": False, "images_every": 0},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    start = time.monotonic()
    by_launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "fdfo_engine/train.py"]
    program = by_launcher if arguments.deepspeed else ["-m", "fdfo_engine.cli.main", "train"]
    command = [sys.executable, *program, "--config", str(folder / "config.yaml")]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    metrics = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    kept = ("reward_mean", "grad_norm", "log_ratio", "skipped_steps", "seconds_rollout", "seconds_update")
    return {
        "image": arguments.image,
        "pairs": arguments.pairs,
        "steps": arguments.steps,
        "seconds_in_all": round(time.monotonic() - start, 1),
        "peak_host_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "metrics": {name: value for name, value in metrics.items() if name.startswith(kept)},
    }


if __name__ == "__main__":
    main()
