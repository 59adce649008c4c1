"""`fdfo evaluate`: base against tuned on the same prompts and seeds, as a table, JSON and a page."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.options import (
    add_base,
    add_checkpoints,
    add_overwrite,
    add_prompt_files,
    add_run_dir,
    add_weights,
    chosen_checkpoints,
    load_prompt_list,
    refuse_absent_average,
    refuse_filled_out,
    refuse_outside,
)
from fdfo_engine.runtime.errors import UsageError

if TYPE_CHECKING:
    from fdfo_engine.config import Config, MetricConfig
    from fdfo_engine.evaluation.compare import Measured, Request
    from fdfo_engine.evaluation.measures import Measures

BASE = "base"
_LARGER_PROMPTS = 64
_SIZE_UNIT = 16


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "evaluate",
        help="compare checkpoints with the untrained model on the same prompts and seeds",
        description="Scores images of the untrained model and of checkpoints: rewards, diversity, image health; writes "
        "evaluation.json, pictures and report.html. A score depends on the seed, the prompt's index, the prompt and "
        "the weights only.",
    )
    add_run_dir(parse)
    add_base(parse)
    add_checkpoints(parse)
    parse.add_argument("--untrained", action="store_true", help="the untrained model alone")
    add_prompt_files(parse, required=False)
    parse.add_argument(
        "--count", type=int, help="the first N prompts; default: all of --prompts, evaluation.count else"
    )
    parse.add_argument(
        "--metrics", metavar="A,B,...", default="",
        help="rewards by name or module:attribute, health or diversity measures, or the groups `health`, `diversity`; "
        "the first one picks winners and losers; default: the run's rewards and metrics, and both groups",
    )  # fmt: skip
    parse.add_argument(
        "--metric", action="append", default=[], metavar="ENTRY",
        help="a metric with options, as an entry of `rewards`: '{name: geneval, metadata: FILE}'; may be repeated",
    )  # fmt: skip
    parse.add_argument("--images-per-prompt", type=int, default=2, metavar="K", help="seeds a prompt; default 2")
    parse.add_argument("--seed", type=int, default=0, help="key of the noise; default 0")
    parse.add_argument("--steps", type=int, help="solver steps; default: the run's")
    parse.add_argument("--guidance-scale", type=float, help="default: the run's")
    add_weights(parse)
    parse.add_argument("--clip", metavar="MODEL", help="CLIP model of clip_diversity: a folder or a hub id")
    parse.add_argument(
        "--larger", type=float, default=1.5, metavar="X",
        help="measure health at X times the run's size too, where the model allows; 1: don't; default 1.5",
    )  # fmt: skip
    parse.add_argument("--confidence", type=float, default=0.95, help="of the intervals; default 0.95")
    parse.add_argument("--pictures", type=int, default=16, metavar="N", help="prompts shown side by side; default 16")
    parse.add_argument("--out", type=Path, metavar="DIR", help="the folder to write; default: RUN/evaluation")
    add_overwrite(parse)
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates and writes."""
    run_dir = arguments.run_dir
    out = arguments.out or run_dir / "evaluation"
    _check(arguments, out)
    from fdfo_engine.runtime.run_folder import run_config

    config = run_config(run_dir, arguments.base)
    refuse_absent_average(arguments, config)
    names = _checkpoints(arguments)
    from fdfo_engine.runtime.terminal import importing

    with importing():
        from fdfo_engine.evaluation.compare import Request, summarize
        from fdfo_engine.evaluation.measures import build_measures
        from fdfo_engine.evaluation.overlap import warn_of_trained
        from fdfo_engine.runtime.distributed import on_main, setup_distributed

    began = time.monotonic()
    prompts = _prompts(arguments, config)
    warn_of_trained(config, prompts)
    device = setup_distributed(_device())
    options = {"clip": arguments.clip} if arguments.clip else {}
    measures = build_measures(
        config, [name for name in arguments.metrics.split(",") if name], more=_entries(arguments.metric),
        images_per_prompt=arguments.images_per_prompt, device=device, allow_download=arguments.allow_download,
        **options,
    )  # fmt: skip
    measures.rewards.require_prompts(prompts)
    on_main(measures.rewards.require_ready)
    request = Request(
        prompts, arguments.seed, arguments.images_per_prompt, arguments.steps, arguments.guidance_scale
    )  # fmt: skip
    sets = _measure(config, names, request, measures, arguments.weights)
    result = summarize(sets, measures.kinds, request, config.evaluation.guard, confidence=arguments.confidence)
    result |= {
        "title": run_dir.resolve().name, "model": config.model.id, "height": config.model.height,
        "width": config.model.width, "larger": _larger(arguments, config, names, request, measures),
    }  # fmt: skip
    _write(out, result, sets, arguments.pictures)
    _say_pace(len(sets) * len(prompts) * arguments.images_per_prompt, time.monotonic() - began)
    return 0


def _say_pace(images: int, seconds: float) -> None:
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.terminal import duration

    say(f"{images} images in {duration(seconds)}, {images / seconds:.2g} images/s with their scores")


def _checkpoints(arguments: argparse.Namespace) -> list[str]:
    """The names of the checkpoints to evaluate, oldest first."""
    if arguments.untrained:
        return []
    from fdfo_engine.runtime.run_folder import checkpoint_store

    chosen = chosen_checkpoints(arguments.run_dir, arguments.checkpoint)
    return sorted(chosen) or checkpoint_store(arguments.run_dir).names()[-1:]


def _check(arguments: argparse.Namespace, out: Path) -> None:
    bounds = {
        "steps": (1, 10_000), "count": (1, 10**9), "seed": (0, 2**64 - 1), "guidance_scale": (0, 1e6),
        "images_per_prompt": (1, 1000), "larger": (1, 8), "confidence": (0.01, 0.9999), "pictures": (0, 1000),
    }  # fmt: skip
    refuse_outside(arguments, bounds)
    refuse_filled_out(out, arguments)


def _entries(texts: list[str]) -> list[MetricConfig]:
    """The entries of `--metric`."""
    import yaml
    from pydantic import ValidationError

    from fdfo_engine.config import MetricConfig

    entries = []
    for text in texts:
        try:
            entries.append(MetricConfig.model_validate(yaml.safe_load(text)))
        except (yaml.YAMLError, ValidationError) as error:
            raise UsageError(f"--metric {text!r}: takes '{{name: NAME, option: value}}': {_reason(error)}") from None
    return entries


def _reason(error: Any) -> str:
    """Of a ValidationError its first problem: the whole would show what was given, a secret perhaps."""
    first = error.errors()[0] if hasattr(error, "errors") else {"msg": str(error).splitlines()[0], "loc": ()}
    return ".".join(map(str, first["loc"])) + (": " if first["loc"] else "") + str(first["msg"])


def _prompts(arguments: argparse.Namespace, config: Config) -> list[str]:
    if arguments.prompts:
        return load_prompt_list(arguments, config)
    from fdfo_engine.evaluation import evaluation_list
    from fdfo_engine.rollout.prompts import describe_prompts
    from fdfo_engine.runtime.console import say

    count = arguments.count or config.evaluation.count
    evaluation = config.evaluation.model_copy(update={"count": count})
    prompts = evaluation_list(config.model_copy(update={"evaluation": evaluation}))
    say(describe_prompts(prompts))
    return prompts.prompts[:count]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _measure(
    config: Config, names: list[str], request: Request, measures: Measures, weights: Any
) -> list[Measured]:  # fmt: skip
    from fdfo_engine.engine import Engine
    from fdfo_engine.evaluation.compare import measure_weights
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.terminal import shown

    images = f"{len(request.prompts)} prompts x {request.images_per_prompt}"
    with shown() as terminal, Engine(config, trains=False, on_event=terminal) as engine:
        say(f"{BASE}: {images}")
        sets = [measure_weights(engine, request, measures, name=BASE, weights="raw")]
        for name in names:
            engine.load(name)
            say(f"{name}: {images}")
            sets.append(measure_weights(engine, request, measures, name=name, weights=weights))
    return sets


def _larger(
    arguments: argparse.Namespace, config: Config, names: list[str], request: Request, measures: Measures
) -> dict[str, Any] | None:
    """Health of base and last checkpoint at a larger size, a note where the model does not allow it, or None."""
    if arguments.larger == 1 or not measures.health:
        return None
    from dataclasses import replace

    import torch

    from fdfo_engine.evaluation.compare import summarize
    from fdfo_engine.evaluation.measures import Measures
    from fdfo_engine.rewards import WeightedRewards

    height, width = (
        round(n * arguments.larger / _SIZE_UNIT) * _SIZE_UNIT for n in (config.model.height, config.model.width)
    )
    size = {"height": height, "width": width}
    larger = config.model_copy(update={"model": config.model.model_copy(update=size)})
    few = replace(request, prompts=request.prompts[:_LARGER_PROMPTS], images_per_prompt=1)
    only_health = Measures(WeightedRewards({}), measures.health, {})
    try:
        sets = _measure(larger, names[-1:], few, only_health, arguments.weights)
    except (UsageError, torch.OutOfMemoryError) as error:
        return size | {"note": str(error)}
    result = summarize(sets, only_health.kinds, few, config.evaluation.guard, confidence=arguments.confidence)
    kept = ("sets", "metrics", "summary", "differences", "health_findings")
    return size | {"prompts": len(few.prompts)} | {key: result[key] for key in kept}


def _write(out: Path, result: dict[str, Any], sets: list[Measured], pictures: int) -> None:
    from fdfo_engine.report.evaluation_files import write_evaluation
    from fdfo_engine.report.evaluation_page import evaluation_table
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.distributed import on_main

    previews = {s.name: s.previews for s in sets if s.previews is not None}
    page = on_main(lambda: write_evaluation(out, result, previews, pictures))
    for line in evaluation_table(result):
        say(line)
    say(f"report: {page}")
