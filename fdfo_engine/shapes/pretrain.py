"""Makes the bench's base: autoencoder, then flow matching, then a pipeline folder with its log and model card.

Step counts define a run, not minutes: equal arguments and thread counts give equal weights.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fdfo_engine.shapes.autoencoder import (
    AutoencoderSettings,
    set_latent_scale,
    train_autoencoder,
    train_decoder,
)
from fdfo_engine.shapes.evaluate import evaluate
from fdfo_engine.shapes.flow import FlowSettings, build_cache, train_flow
from fdfo_engine.shapes.pipeline import build_pipeline, load_pipeline, save_pipeline
from fdfo_engine.shapes.scene import captions

LOG_NAME = "pretraining.jsonl"
Line = dict[str, Any]


@dataclass(frozen=True)
class Reporting:
    """What a run tells on its way; it never changes what is learned."""

    log_every: int = 100
    evaluate_every: int = 1000
    eval_captions: int = 128
    eval_seed: int = 1234
    progress: Callable[[Line], None] | None = None
    """Called with each line of the log."""
    step: Callable[[str, int, int], None] | None = None
    """Called after each step with the stage's name, the steps done and all of them."""


@dataclass(frozen=True)
class PretrainSettings:
    """The two stages of pretraining; the defaults made the shipped base."""

    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)


def pretrain(
    out: Path, *, seed: int = 0, settings: PretrainSettings | None = None, reporting: Reporting | None = None
) -> None:
    """Trains a shapes pipeline from nothing and writes it to the folder `out`, replacing what is there.

    Held-out captions are only reported on; nothing is chosen by them.
    """
    settings, reporting = settings or PretrainSettings(), reporting or Reporting()
    pipe, log = build_pipeline(seed), _Log(out, reporting)
    log.write("settings", seed=seed, threads=torch.get_num_threads(), **asdict(settings))
    train_autoencoder(pipe, settings.autoencoder, seed, log.stage("autoencoder", settings.autoencoder.steps))
    train_decoder(pipe, settings.autoencoder, seed, log.stage("decoder", settings.autoencoder.decoder_steps))
    cache = build_cache(pipe, settings.flow.pictures, seed)
    set_latent_scale(pipe, cache.latents)
    log.write("cache", pictures=len(cache.tokens), scale=pipe.vae.config.scaling_factor)
    train_flow(pipe, cache, settings.flow, seed, log.stage("flow", settings.flow.steps, pipe))
    log.finish(pipe)


def continue_pretraining(
    base: Path,
    out: Path,
    *,
    steps: int,
    seed: int = 1,
    learning_rate: float = 1e-4,
    pictures: int = 40_000,
    reporting: Reporting | None = None,
) -> None:
    """Trains the folder `base` further at a constant rate on pictures of another seed and writes it to `out`.

    The autoencoder stays as it is. It is the fair comparison for reinforcement learning: the same time, spent on more
    pretraining.
    """
    pipe, log = load_pipeline(base), _Log(out, reporting or Reporting())
    flow = FlowSettings(steps=steps, learning_rate=learning_rate, decay=False, pictures=pictures)
    log.write("settings", seed=seed, threads=torch.get_num_threads(), base=base.name, flow=asdict(flow))
    cache = build_cache(pipe, pictures, seed)
    log.write("cache", pictures=len(cache.tokens))
    train_flow(pipe, cache, flow, seed, log.stage("flow", steps, pipe))
    log.finish(pipe)


def replace_folder(pipe: Any, out: Path, log_lines: list[str]) -> None:
    """Writes the pipeline and its log beside `out` and puts the folder in place by renaming; keeps README.md."""
    fresh = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(pipe, fresh)
    (fresh / LOG_NAME).write_text("".join(log_lines), encoding="utf-8")
    if out.exists():
        if (out / "README.md").exists():
            shutil.copy(out / "README.md", fresh)
        gone = out.with_name(f"{out.name}.old.tmp")
        os.replace(out, gone)
        os.replace(fresh, out)
        shutil.rmtree(gone)
    else:
        os.replace(fresh, out)


class _Log:
    """The lines of one run: kept to be saved with the pipeline, and written to `<out>.jsonl.tmp` as they come."""

    def __init__(self, out: Path, reporting: Reporting) -> None:
        self.out, self.reporting = out, reporting
        self.lines: list[str] = []
        self.texts = captions("heldout", reporting.eval_captions, reporting.eval_seed)
        self.started = time.monotonic()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.live = out.with_name(f"{out.name}.jsonl.tmp")
        self.live.unlink(missing_ok=True)

    def write(self, stage: str, **values: Any) -> None:
        line = {"stage": stage, "seconds": round(time.monotonic() - self.started, 1), **values}
        self.lines.append(json.dumps(line) + "\n")
        with self.live.open("a", encoding="utf-8") as file:
            file.write(self.lines[-1])
        if self.reporting.progress:
            self.reporting.progress(line)

    def stage(self, name: str, steps: int, pipe: Any = None) -> Callable[[int, float], None]:
        """Returns a callback for a training stage; with `pipe` it also evaluates on the way."""
        losses: list[float] = []

        def log(step: int, loss: float) -> None:
            losses.append(loss)
            if self.reporting.step:
                self.reporting.step(name, step, steps)
            due = pipe is not None and (step % self.reporting.evaluate_every == 0 or step == steps)
            if due or step % self.reporting.log_every == 0 or step == steps:
                quality = self.quality(pipe) if due else {}
                self.write(name, step=step, loss=round(sum(losses) / len(losses), 5), **quality)
                losses.clear()

        return log

    def quality(self, pipe: Any) -> dict[str, float]:
        """Returns mean score and strict share on held-out captions at 8 and at 16 steps."""
        found: dict[str, float] = {}
        for steps in (8, 16):
            quality = evaluate(pipe, self.texts, steps)
            found |= {f"score_{steps}": round(quality.score, 4), f"strict_{steps}": round(quality.strict, 4)}
        return found

    def finish(self, pipe: Any) -> None:
        replace_folder(pipe, self.out, self.lines)
        self.live.unlink()
