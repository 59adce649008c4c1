"""What every model family must do, against its own diffusers pipeline with random weights; a test module each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_sd3 import PROMPTS, SIZE, tiny_config

from fdfo_engine import Engine
from fdfo_engine.models.guidance import predict
from fdfo_engine.models.prompt_cache import PromptCache
from fdfo_engine.models.prompt_store import open_prompt_store
from fdfo_engine.models.registry import load_model
from fdfo_engine.ops import GENERATION_STREAM, guided_velocity, philox_normal
from fdfo_engine.planning.footprint import Line, blank_footprint, footprint
from fdfo_engine.runtime.errors import CheckpointError, UsageError

CPU = torch.device("cpu")
STEPS = 4
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.2], [1.0, 0.0]])


@dataclass(frozen=True)
class Tiny:
    """A pipeline folder, and how its own pipeline is called: `call(pipeline, prompts, latents, guidance)`."""

    folder: Path
    pipeline_class: Any
    call: Callable[..., Any]
    settings: dict[str, Any]

    def config(self, run_dir, **sections):
        """Settings of a run; `sections` are laid over the family's."""
        names = self.settings.keys() | sections.keys()
        merged = {name: {**self.settings.get(name, {}), **sections.get(name, {})} for name in names}
        return tiny_config(self.folder, run_dir, **merged)

    def pipeline(self, folder=None):
        """diffusers' own."""
        pipeline = self.pipeline_class.from_pretrained(folder or self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def images(self, pipeline, guidance, noise):
        """What the pipeline itself makes of `noise` `[N, C, H, W]`."""
        return self.call(
            pipeline, list(PROMPTS), noise, guidance,
            num_inference_steps=STEPS, height=SIZE, width=SIZE, output_type="pt",
        )  # fmt: skip

    def generated(self, pipeline, guidance, seed=0):
        """What `Engine.generate` should give."""
        count = range(len(PROMPTS))
        noise = philox_normal((4, 8, 8), seed=seed, pair_ids=count, stream=GENERATION_STREAM, device="cpu")
        return self.images(pipeline, guidance, noise)


def largest(difference):
    return difference.abs().max().item()


def moved(engine, scale=0.1):
    """Puts random trained weights into `engine`."""
    generator = torch.Generator().manual_seed(3)
    weights = {n: w + scale * torch.randn(w.shape, generator=generator) for n, w in engine.trainer.weights().items()}
    engine.trainer.load(weights, engine.trainer.state())


def check_generation_is_the_pipelines_own(tiny, run_dir, guidance):
    images = Engine(tiny.config(run_dir)).generate(PROMPTS, seed=7, guidance_scale=guidance)
    assert largest(images - tiny.generated(tiny.pipeline(), guidance, seed=7)) < 1e-5


def check_rollout_without_churn_is_the_pipelines_own(tiny, run_dir, guidance):
    sampling = {"guidance_scale": guidance, "churn": {"schedule": "raw", "weight": 0.0}}
    rollout = Engine(tiny.config(run_dir, sampling=sampling)).rollout(PROMPTS)
    noise = philox_normal((4, 8, 8), seed=5, pair_ids=range(len(PROMPTS)), stream=0, device="cpu")
    exact = tiny.images(tiny.pipeline(), guidance, noise)
    for branch in (0, 1):
        assert largest(rollout.images[:, branch] - exact) < 1e-5


def check_guidance_and_prompts_matter(tiny, run_dir):
    engine = Engine(tiny.config(run_dir))
    plain, guided = engine.generate(PROMPTS), engine.generate(PROMPTS, guidance_scale=4.5)
    assert largest(plain - guided) > 1e-2
    assert largest(plain - engine.generate(PROMPTS[::-1])) > 1e-3


def check_replayed_velocities_are_the_sampled_ones(tiny, run_dir, guidance):
    """To the bit at an equal batch: what the update recomputes is what the rollout's steps used."""
    engine = Engine(tiny.config(run_dir, sampling={"guidance_scale": guidance, "block_pairs": 4}))
    rollout = engine.rollout(PROMPTS)
    pair, branch = torch.arange(4).repeat_interleave(2), torch.arange(2).repeat(4)
    conditioning, negative = engine.sampler.conditioning([PROMPTS[p] for p in pair])
    for i in range(STEPS):
        step = torch.full((8,), i)
        x = rollout.latents(pair, branch, step)
        with torch.no_grad():
            v = guided_velocity(
                *predict(engine.model, engine.trainer, x, rollout.timesteps[step], conditioning, negative, guidance),
                guidance,
            )
        assert torch.equal(v, rollout.velocities[pair, branch, step])


def check_resume_is_bit_for_bit(tiny, run_dir, guidance):
    config = tiny.config(run_dir, sampling={"guidance_scale": guidance})
    engine = Engine(config)
    first = engine.update(engine.rollout(PROMPTS), REWARDS)
    assert first["grad_norm"] > 0
    assert first["log_ratio_floor"] < 1e-6
    engine.save()
    engine.update(engine.rollout(PROMPTS), REWARDS)
    resumed = Engine.resume(run_dir)
    resumed.update(resumed.rollout(PROMPTS), REWARDS)
    exact, found = engine.trainer.weights(), resumed.trainer.weights()
    assert exact.keys() == found.keys()
    assert all(torch.equal(exact[name], found[name]) for name in exact)


def check_a_bfloat16_run(tiny, run_dir):
    """Frozen weights and stored velocities in bfloat16; guided once and rounded once on both sides, so equal."""
    config = tiny.config(run_dir, model={"dtype": "bfloat16"}, sampling={"guidance_scale": 4.5})
    engine = Engine(config)
    rollout = engine.rollout(PROMPTS)
    assert rollout.velocities.dtype == torch.bfloat16
    metrics = engine.update(rollout, REWARDS)
    assert metrics["grad_norm"] > 0
    assert metrics["log_ratio_floor"] < 1e-3


def check_kl_is_of_the_guided_velocities(tiny, run_dir, guidance):
    """Nothing before the adapter has moved; then the mean over all items of the squared distance to the base."""
    settings = {"update": {"kl_weight": 0.1, "optimizer_steps": 1, "micro_batch": 64}}
    engine = Engine(tiny.config(run_dir, sampling={"guidance_scale": guidance}, **settings))
    assert engine.update(engine.rollout(PROMPTS), REWARDS)["kl"] == 0
    moved(engine, scale=0.05)
    rollout = engine.rollout(PROMPTS)
    base = load_model(tiny.config(run_dir), CPU)
    total = 0.0
    for p, prompt in enumerate(PROMPTS):
        rows = torch.zeros(2 * STEPS, dtype=torch.int64)
        branch, step = torch.arange(2).repeat_interleave(STEPS), torch.arange(STEPS).repeat(2)
        negative = None if guidance == 1 else base.encode_prompt("").rows(rows)
        conditioning, x = base.encode_prompt(prompt).rows(rows), rollout.latents(rows + p, branch, step)
        with torch.no_grad():
            v = guided_velocity(
                *predict(base, base.network, x, rollout.timesteps[step], conditioning, negative, guidance), guidance
            )
        total += (v - rollout.velocities[p].flatten(0, 1)).square().mean().item() / len(PROMPTS)
    assert engine.update(rollout, REWARDS)["kl"] == pytest.approx(total, rel=1e-4)


def check_export_is_the_same_in_diffusers(tiny, tmp_path, train, guidance):
    engine = Engine(tiny.config(tmp_path / "run", model={"train": train}))
    base = engine.generate(PROMPTS, guidance_scale=guidance)
    moved(engine, scale=0.1 if train == "lora" else 0.02)
    engine.export(tmp_path / "out")
    fresh = tiny.pipeline(tmp_path / "out" if train == "full" else None)
    if train == "lora":
        fresh.load_lora_weights(tmp_path / "out")
    images = tiny.generated(fresh, guidance)
    assert largest(images - engine.generate(PROMPTS, guidance_scale=guidance)) < 1e-5
    assert largest(images - base) > 1e-2


def check_merged_export_is_the_same_in_diffusers(tiny, tmp_path):
    engine = Engine(tiny.config(tmp_path / "run"))
    moved(engine)
    engine.export(tmp_path / "out", style="merged")
    images = tiny.generated(tiny.pipeline(tmp_path / "out"), 1.0)
    assert largest(images - engine.generate(PROMPTS, guidance_scale=1.0)) < 1e-5
    full = load_model(tiny.config(tmp_path / "full", model={"train": "full"}), CPU)
    with pytest.raises(UsageError, match="style merged is a LoRA's"):
        full.export(tmp_path / "other", {}, style="merged")


def comfyui_export(tiny, tmp_path):
    """An engine with a trained adapter, and its export in style comfyui: file and tensors."""
    engine = Engine(tiny.config(tmp_path / "run"))
    moved(engine)
    engine.export(tmp_path / "out", style="comfyui")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    return engine, file, load_file(file)


def changes(weights, scale=1.0):
    """The change of each layer's weights, float64, of a LoRA in diffusers' or peft's names."""
    weights = {name.removeprefix("transformer.").replace(".default.", "."): w.double() for name, w in weights.items()}
    downs = {name.removesuffix(".lora_A.weight"): w for name, w in weights.items() if name.endswith(".lora_A.weight")}
    return {name: scale * weights[f"{name}.lora_B.weight"] @ down for name, down in downs.items()}


def native_change(tensors, layer):
    """The same of one layer in original names."""
    down, up, alpha = (tensors[f"lora_unet_{layer}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    return (up.double() @ down.double()) * (alpha.item() / len(down))


def check_comfyui_refusals(tiny, tmp_path, monkeypatch, other_layer):
    full = load_model(tiny.config(tmp_path / "a", model={"train": "full"}), CPU)
    with pytest.raises(UsageError, match="style comfyui is a LoRA's"):
        full.export(tmp_path / "out", {}, style="comfyui")
    if other_layer is not None:
        engine = Engine(tiny.config(tmp_path / "b", lora={"targets": [other_layer]}))
        with pytest.raises(UsageError, match=f"style comfyui has no name for .*{other_layer}"):
            engine.export(tmp_path / "out", style="comfyui")
    engine = Engine(tiny.config(tmp_path / "c"))
    moved(engine)
    monkeypatch.setattr("fdfo_engine.models.pipeline_model.fold_alpha", lambda weights, scale: weights)
    with pytest.raises(CheckpointError, match="loaded back"):
        engine.export(tmp_path / "out", style="comfyui")
    assert not (tmp_path / "out").exists()


def check_blank_sizes_are_the_loaded_models(tiny, tmp_path, *, slack=0, **model):
    """To the byte, or to `slack` bytes where code builds small constants that only one of the two counts sees."""
    config = tiny.config(tmp_path, model={"fused": False, **model})
    loaded = load_model(config, CPU)
    counted = footprint(loaded, loaded.encode_prompt("a red circle"), config.model.height, config.model.width)
    blank = blank_footprint(config)
    for name, size in vars(counted).items():
        found = getattr(blank, name)
        pairs = zip(found, size, strict=True) if isinstance(size, Line) else [(found, size)]
        assert all(abs(a - b) <= slack for a, b in pairs), (name, found, size)


def check_prompts_come_back_from_the_disk(tiny, tmp_path):
    config = tiny.config(tmp_path / "run", model={"prompt_cache": str(tmp_path / "prompts")})
    model = load_model(config, CPU)
    encoded = PromptCache(model, open_prompt_store(config, CPU)).encode(PROMPTS)
    model.encode_prompt = None
    read = PromptCache(model, open_prompt_store(config, CPU)).encode(PROMPTS)
    assert encoded.tensors.keys() == read.tensors.keys()
    assert all(torch.equal(encoded.tensors[name], read.tensors[name]) for name in read.tensors)


def adapted_modules(model):
    """Names of the modules that have a LoRA."""
    return {name.split(".lora_")[0] for name, _ in model.trained_parameters()}
