"""`fdfo generate`: images from a run's weights, from the untrained model, or from both side by side."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine import __version__
from fdfo_engine.cli.options import (
    SHAPES_COUNT,
    add_base,
    add_checkpoints,
    add_overwrite,
    add_prompt_files,
    add_weights,
    chosen_checkpoints,
    load_prompt_list,
    refuse_absent_average,
    refuse_filled_out,
    refuse_outside,
)
from fdfo_engine.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fdfo_engine.config import Config
    from fdfo_engine.runtime.terminal import Terminal

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
    parse.add_argument("--count", type=int, help=f"the first N prompts; default all, {SHAPES_COUNT} of shapes")
    parse.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    add_overwrite(parse)
    parse.add_argument("--seed", type=int, default=0, help="key of the noise; default 0")
    parse.add_argument("--steps", type=int, help="solver steps; default: the run's")
    parse.add_argument("--guidance-scale", type=float, help="default: the run's")
    add_base(parse)
    add_checkpoints(parse, ": the grid has a column for each")
    add_weights(parse)
    which = parse.add_mutually_exclusive_group()
    which.add_argument("--untrained", action="store_true", help="the untrained model")
    which.add_argument("--compare", action="store_true", help="both; the grid shows untrained left, trained right")
    parse.add_argument(
        "--film", choices=("gif", "apng"), help="also a film of the grid: the untrained model, then each checkpoint"
    )
    parse.add_argument("--frame-ms", type=int, default=800, metavar="MS", help="of the film; default 800")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Generates and writes."""
    _check(arguments)
    config = _config(arguments.source, arguments.base)
    refuse_absent_average(arguments, config)
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.terminal import importing, shown

    with importing():
        prompts = _prompts(arguments, config)
    checkpoints = _checkpoints(arguments, config)
    with shown() as terminal:
        sets = _images(arguments, config, prompts, checkpoints, terminal)
    _write(arguments.out, prompts, sets, _origin(arguments, config))
    if arguments.film:
        _write_film(arguments, prompts, sets)
        _tell_of_missing_frames(config, len(checkpoints))
    counted = "1 prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
    say(f"{counted}, {' and '.join(sets)}: {arguments.out / 'grid.png'}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    bounds = {
        "steps": (1, 10_000), "count": (1, 10**9), "seed": (0, 2**64 - 1), "guidance_scale": (0, 1e6),
        "frame_ms": (20, 60_000),
    }  # fmt: skip
    refuse_outside(arguments, bounds)
    refuse_filled_out(arguments.out, arguments)


def _config(source: str, base: str | None) -> Config:
    """The settings of a run folder, or of a config file."""
    from fdfo_engine.config import bundled_configs, load_config
    from fdfo_engine.runtime.run_folder import run_config, runs_beside

    if Path(source).is_dir():
        return run_config(source, base)
    if Path(source).is_file() or Path(source).suffix in (".yaml", ".yml") or source in bundled_configs():
        config = load_config(source)
        return config if base is None else config.with_base(base)
    raise UsageError(
        f"{source}: no such run folder{runs_beside(source)}; no config either (bundled: {', '.join(bundled_configs())})"
    )


def _prompts(arguments: argparse.Namespace, config: Config) -> list[str]:
    if arguments.prompt:
        return list(arguments.prompt)[: arguments.count]
    return load_prompt_list(arguments, config)


def _checkpoints(arguments: argparse.Namespace, config: Config) -> list[str | None]:
    """Names of the checkpoints to show; None is the newest whole one."""
    if arguments.untrained:
        return []
    return [*chosen_checkpoints(config.run.dir, arguments.checkpoint)] or [None]


def _images(
    arguments: argparse.Namespace, config: Config, prompts: list[str], checkpoints: list[str | None], terminal: Terminal
) -> dict[str, Tensor]:
    """Name of a set of weights -> images `[N, 3, H, W]`."""
    with terminal.working("loading"):
        from fdfo_engine.engine import Engine

    engine = Engine(config, trains=False, on_event=terminal)
    options = {"seed": arguments.seed, "steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    sets = {}
    if arguments.untrained or arguments.compare or arguments.film:
        sets["untrained"] = engine.generate(prompts, weights="raw", **options)
    for name in checkpoints:
        engine.load(name)
        sets[f"epoch {engine.epoch}"] = engine.generate(prompts, weights=arguments.weights, **options)
    return sets


def _origin(arguments: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What a picture depends on beside its prompt, its index and the weights."""
    model, sampling, guidance = config.model, config.sampling, arguments.guidance_scale
    origin = {
        "run": config.run.dir, "model": model.id, "seed": arguments.seed, "steps": arguments.steps or sampling.steps,
        "guidance_scale": sampling.guidance_scale if guidance is None else guidance, "height": model.height,
        "width": model.width, "fdfo_engine": __version__,
    }  # fmt: skip
    embedded = sampling.embedded_guidance
    return origin if embedded is None else origin | {"embedded_guidance": embedded}


def _write(out: Path, prompts: list[str], sets: dict[str, Tensor], origin: dict[str, Any]) -> None:
    """A PNG for each picture, which says in its text `fdfo_engine` what its line of images.jsonl says."""
    import torch

    from fdfo_engine.runtime.picture import draw_grid, save_png, to_picture

    records, main = [], list(sets)[-1]
    for name, images in sets.items():
        suffix = "" if name == main else f"_{_slug(name)}"
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            file = f"{i:04d}_{_slug(prompt)}{suffix}.png"
            record = json.dumps({"file": file, "prompt": prompt, "index": i, "weights": name} | origin)
            save_png(to_picture(image), out / file, {"fdfo_engine": record})
            records.append(record + "\n")
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


def _tell_of_missing_frames(config: Config, shown: int) -> None:
    """A run keeps its newest checkpoints only: a film of it passes from the untrained model to the oldest of these."""
    from fdfo_engine.runtime.console import warn

    every, keep = config.checkpoint.every, config.checkpoint.keep
    if config.run.epochs // every > keep >= shown:
        warn(
            f"the film has no frames of earlier epochs: the run keeps its newest {keep} checkpoints; "
            "checkpoint.keep says how many"
        )


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40] or "prompt"
