"""`fdfo generate`: images from a run's weights, from the untrained model, or from both side by side."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.export import add_weights, refuse_filled, refuse_outside
from fdfo_engine.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from fdfo_engine.config import Config

_SHAPES_COUNT = 16
_COLUMNS = 4


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "generate",
        help="make images from a run's weights or from the untrained model",
        description="Writes one PNG a prompt, grid.png and images.jsonl. Image i depends on the seed, i, the prompt "
        "and the weights only.",
    )
    parse.add_argument("source", metavar="RUN_DIR|CONFIG", help="a run folder, or a config, which stands for its run")
    prompts = parse.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    prompts.add_argument("--prompts", metavar="FILE", help="text or .jsonl file, or `shapes`: its held-out captions")
    parse.add_argument("--count", type=int, help=f"the first N prompts; default all, {_SHAPES_COUNT} of shapes")
    parse.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parse.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parse.add_argument("--seed", type=int, default=0, help="key of the noise; default 0")
    parse.add_argument("--steps", type=int, help="solver steps; default: the run's")
    parse.add_argument("--guidance-scale", type=float, help="default: the run's")
    parse.add_argument("--checkpoint", metavar="NAME", help="such as epoch_000010; default: the newest")
    add_weights(parse)
    which = parse.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="the untrained model")
    which.add_argument("--compare", action="store_true", help="both; the grid shows untrained left, trained right")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Generates and writes."""
    _check(arguments)
    config = _config(arguments.source)
    prompts = _prompts(arguments, config)
    if not arguments.base:
        _require_checkpoint(config)
    sets = _images(arguments, config, prompts)
    _write(arguments.out, prompts, sets)
    from fdfo_engine.runtime.console import say

    say(f"{len(prompts)} prompts, {' and '.join(sets)}: {arguments.out / 'grid.png'}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    bounds = {"steps": (1, 10_000), "count": (1, 10**9), "seed": (0, 2**64 - 1), "guidance_scale": (0, 1e6)}
    for name, (least, most) in bounds.items():
        refuse_outside(arguments, name, least, most)
    refuse_filled(arguments.out, arguments.overwrite)


def _config(source: str) -> Config:
    """The settings of a run folder, or of a config file."""
    from fdfo_engine.config import load_config
    from fdfo_engine.runtime.run_folder import run_config

    return run_config(source) if Path(source).is_dir() else load_config(source)


def _prompts(arguments: argparse.Namespace, config: Config) -> list[str]:
    if arguments.prompt:
        return list(arguments.prompt)[: arguments.count]
    from fdfo_engine.rollout.prompts import load_prompts

    count = arguments.count or (_SHAPES_COUNT if arguments.prompts == "shapes" else None)
    settings = config.prompts.model_copy(update={"source": arguments.prompts} | ({"count": count} if count else {}))
    return load_prompts(settings, config.evaluation.seed, split="heldout").prompts[:count]


def _require_checkpoint(config: Config) -> None:
    from fdfo_engine.runtime.checkpoint import CheckpointStore
    from fdfo_engine.runtime.run_folder import CHECKPOINTS_NAME

    if not CheckpointStore(Path(config.run.dir) / CHECKPOINTS_NAME).names():
        raise CheckpointError(f"{config.run.dir}: no checkpoint there; --base takes the untrained model")


def _images(arguments: argparse.Namespace, config: Config, prompts: list[str]) -> dict[str, Tensor]:
    """Name of a set of weights -> images `[N, 3, H, W]`."""
    from fdfo_engine.engine import Engine

    engine = Engine(config)
    options = {"seed": arguments.seed, "steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    sets = {}
    if arguments.base or arguments.compare:
        sets["untrained"] = engine.generate(prompts, weights="raw", **options)
    if not arguments.base:
        engine.load(arguments.checkpoint)
        sets[f"epoch {engine.epoch}"] = engine.generate(prompts, weights=arguments.weights, **options)
    return sets


def _write(out: Path, prompts: list[str], sets: dict[str, Tensor]) -> None:
    import torch

    from fdfo_engine.runtime.picture import draw_grid, save_png, to_picture

    records = []
    for name, images in sets.items():
        suffix = "_untrained" if len(sets) > 1 and name == "untrained" else ""
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            file = f"{i:04d}_{_slug(prompt)}{suffix}.png"
            save_png(to_picture(image), out / file)
            records.append(json.dumps({"file": file, "prompt": prompt, "weights": name}) + "\n")
    (out / "images.jsonl").write_text("".join(records), encoding="utf-8")
    rows = torch.stack(list(sets.values()), 1).flatten(0, 1)
    captions = [f"{name}: {prompt}" if len(sets) > 1 else prompt for prompt in prompts for name in sets]
    save_png(draw_grid(rows, captions, min(_COLUMNS, len(rows))), out / "grid.png")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40] or "prompt"
