"""`fdfo generate`: images from a run's weights, from the untrained model, or from both side by side."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.export import add_weights, refuse_outside
from fdfo_engine.runtime.durable import refuse_filled
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
    add_prompt_files(parse, required=True).add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated"
    )
    parse.add_argument("--count", type=int, help=f"the first N prompts; default all, {_SHAPES_COUNT} of shapes")
    parse.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parse.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parse.add_argument("--seed", type=int, default=0, help="key of the noise; default 0")
    parse.add_argument("--steps", type=int, help="solver steps; default: the run's")
    parse.add_argument("--guidance-scale", type=float, help="default: the run's")
    parse.add_argument(
        "--checkpoint", action="append", default=[], metavar="NAME",
        help="such as epoch_000010, or `all`; may be repeated: the grid has a column for each; default: the newest",
    )  # fmt: skip
    add_weights(parse)
    which = parse.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="the untrained model")
    which.add_argument("--compare", action="store_true", help="both; the grid shows untrained left, trained right")
    parse.add_argument(
        "--film", choices=("gif", "apng"), help="also a film of the grid: the untrained model, then each checkpoint"
    )
    parse.add_argument("--frame-ms", type=int, default=800, metavar="MS", help="of the film; default 800")
    parse.set_defaults(verb=run)


def add_prompt_files(parse: argparse.ArgumentParser, *, required: bool) -> Any:
    """`--prompts` with its options; returns the exclusive group, to which a verb may add."""
    group = parse.add_mutually_exclusive_group(required=required)
    group.add_argument(
        "--prompts", metavar="FILE|SET",
        help="text, .jsonl, .json, .csv, .tsv or .parquet file; drawbench, parti, hpdv2, pickscore or "
        "hub:OWNER/NAME/FILE; or `shapes`: its held-out captions",
    )  # fmt: skip
    parse.add_argument("--column", help="column of the prompt in a file that has several; default: the run's")
    parse.add_argument("--allow-download", action="store_true", help="let a prompt set or a metric's model be fetched")
    return group


def load_prompt_list(arguments: argparse.Namespace, config: Config) -> list[str]:
    """The prompts of `--prompts`, the first `--count` of them."""
    from fdfo_engine.rollout.prompts import load_prompts

    count = arguments.count or (_SHAPES_COUNT if arguments.prompts == "shapes" else None)
    changes: dict[str, Any] = {"source": arguments.prompts, "allow_download": arguments.allow_download}
    changes |= {"count": count} if count else {}
    changes |= {"column": arguments.column} if arguments.column else {}
    settings = config.prompts.model_copy(update=changes)
    return load_prompts(settings, config.evaluation.seed, split="heldout").prompts[:count]


def run(arguments: argparse.Namespace) -> int:
    """Generates and writes."""
    _check(arguments)
    config = _config(arguments.source)
    prompts = _prompts(arguments, config)
    checkpoints = [] if arguments.base else _checkpoints(config, arguments.checkpoint)
    sets = _images(arguments, config, prompts, checkpoints)
    _write(arguments.out, prompts, sets)
    if arguments.film:
        _write_film(arguments, prompts, sets)
    from fdfo_engine.runtime.console import say

    say(f"{len(prompts)} prompts, {' and '.join(sets)}: {arguments.out / 'grid.png'}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    bounds = {
        "steps": (1, 10_000), "count": (1, 10**9), "seed": (0, 2**64 - 1), "guidance_scale": (0, 1e6),
        "frame_ms": (20, 60_000),
    }  # fmt: skip
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
    return load_prompt_list(arguments, config)


def _checkpoints(config: Config, wanted: list[str]) -> list[str | None]:
    """Names of the checkpoints to show; None is the newest whole one."""
    from fdfo_engine.runtime.run_folder import checkpoint_store

    found = checkpoint_store(config.run.dir).names()
    if not found:
        raise CheckpointError(f"{config.run.dir}: no checkpoint there; --base takes the untrained model")
    if "all" in wanted:
        return list(found)
    return list(dict.fromkeys(wanted)) if wanted else [None]


def _images(
    arguments: argparse.Namespace, config: Config, prompts: list[str], checkpoints: list[str | None]
) -> dict[str, Tensor]:
    """Name of a set of weights -> images `[N, 3, H, W]`."""
    from fdfo_engine.engine import Engine

    engine = Engine(config, trains=False)
    options = {"seed": arguments.seed, "steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    sets = {}
    if arguments.base or arguments.compare or arguments.film:
        sets["untrained"] = engine.generate(prompts, weights="raw", **options)
    for name in checkpoints:
        engine.load(name)
        sets[f"epoch {engine.epoch}"] = engine.generate(prompts, weights=arguments.weights, **options)
    return sets


def _write(out: Path, prompts: list[str], sets: dict[str, Tensor]) -> None:
    import torch

    from fdfo_engine.runtime.picture import draw_grid, save_png, to_picture

    records, main = [], list(sets)[-1]
    for name, images in sets.items():
        suffix = "" if name == main else f"_{_slug(name)}"
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            file = f"{i:04d}_{_slug(prompt)}{suffix}.png"
            save_png(to_picture(image), out / file)
            records.append(json.dumps({"file": file, "prompt": prompt, "weights": name}) + "\n")
    (out / "images.jsonl").write_text("".join(records), encoding="utf-8")
    rows = torch.stack(list(sets.values()), 1).flatten(0, 1)
    captions = [f"{name}: {prompt}" if len(sets) > 1 else prompt for prompt in prompts for name in sets]
    columns = len(sets) * max(1, min(_COLUMNS // len(sets), len(prompts)))
    save_png(draw_grid(rows, captions, columns), out / "grid.png")


def _write_film(arguments: argparse.Namespace, prompts: list[str], sets: dict[str, Tensor]) -> None:
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.picture import draw_grid, save_film

    frames = [
        draw_grid(images, [f"{name}: {prompt}" for prompt in prompts], min(_COLUMNS, len(prompts)))
        for name, images in sets.items()
    ]
    path = arguments.out / ("film.gif" if arguments.film == "gif" else "film.png")
    save_film(frames, path, arguments.frame_ms)
    say(f"film of {len(frames)} frames: {path}")


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40] or "prompt"
