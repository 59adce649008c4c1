"""A LoRA on frozen weights in four bits: bitsandbytes packs them, everything else stays as it was."""

import bitsandbytes
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_sd3 import tiny_config

from fdfo_engine import Engine
from fdfo_engine.models.quantized import NF4_BYTES, rounding_error
from fdfo_engine.models.registry import load_model
from fdfo_engine.planning.footprint import blank_footprint

PROMPTS = ["a red circle", "two blue dogs", "a green square", "one cat"]
REWARDS = torch.tensor([[3.0, 1.0], [-2.0, 4.0], [0.5, 1.5], [1.0, 0.0]])


def packed_config(folder, run_dir, **model):
    return tiny_config(folder, run_dir, model={"quantize": "nf4", **model})


def inputs(model):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, *model.latent_shape, generator=generator)
    conditioning = model.encode_prompt("a red circle").rows(torch.zeros(2, dtype=torch.int64))
    return latents, torch.tensor([900.0, 200.0]), conditioning


def test_it_computes_with_the_weights_as_bitsandbytes_unpacks_them(tiny_sd3, tmp_path):
    model = load_model(packed_config(tiny_sd3, tmp_path), torch.device("cpu"))
    plain = SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer")
    packed = [n for n, m in plain.named_modules() if type(m) is torch.nn.Linear and n.startswith("transformer_blocks")]
    assert len(packed) > 20
    for name in packed:
        linear, weight = plain.get_submodule(name), plain.get_submodule(name).weight
        found, state = bitsandbytes.functional.quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
        linear.weight.data = bitsandbytes.functional.dequantize_4bit(found, state).to(weight.dtype)
    latents, timesteps, conditioning = inputs(model)
    with torch.no_grad():
        found = model.velocity(model.network, latents, timesteps, conditioning)
        wanted = plain(latents, timestep=timesteps, return_dict=False, **conditioning.tensors)[0]
        whole = load_model(tiny_config(tiny_sd3, tmp_path), torch.device("cpu"))
        exact = whole.velocity(whole.network, latents, timesteps, conditioning)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert (found - exact).norm() > 1e-3 * exact.norm(), "four bits are not exact"


def test_what_four_bits_cost_is_told(tiny_sd3, tmp_path, capsys):
    weights = [torch.randn(256, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    # 16 levels at the normal distribution's quantiles, scaled to the largest of each 64: about a tenth is lost
    assert rounding_error(weights) == pytest.approx(0.092, abs=0.01)
    level = torch.tensor([-1.0, 0.0, 1.0, 1.0]).repeat(64)
    assert rounding_error([level]) < 1e-3, "values that are levels lose nothing but their scale's rounding"
    load_model(packed_config(tiny_sd3, tmp_path), torch.device("cpu"))
    assert "layers in four bits, their weights off by" in capsys.readouterr().out


def test_it_trains_resumes_and_exports(tiny_sd3, tmp_path):
    engine = Engine(packed_config(tiny_sd3, tmp_path / "run"))
    assert all(p.dtype == torch.float32 for _, p in engine.model.trained_parameters())
    before = engine.trainer.weights()
    metrics = engine.update(engine.rollout(PROMPTS), REWARDS)
    assert (metrics["optimizer_steps"], metrics["log_ratio_floor"]) == (2, pytest.approx(0, abs=1e-6))
    after = engine.trainer.weights()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    engine.save()

    resumed = Engine.resume(tmp_path / "run")
    assert all(torch.equal(weight, after[name]) for name, weight in resumed.trainer.weights().items())
    one, two = (e.update(e.rollout(PROMPTS), REWARDS)["loss"] for e in (engine, resumed))
    assert one == two

    resumed.export(tmp_path / "native", style="comfyui")  # both are verified against a quantised pipeline
    resumed.export(tmp_path / "lora")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.load_lora_weights(tmp_path / "lora")


def test_a_plan_counts_four_bits_a_weight(tiny_sd3, tmp_path):
    whole, packed = (blank_footprint(c(tiny_sd3, tmp_path)) for c in (tiny_config, packed_config))
    plain = SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer")
    blocks = [m for m in plain.transformer_blocks.modules() if type(m) is torch.nn.Linear]
    values = [m.weight.numel() for m in blocks]
    assert whole.frozen - packed.frozen == sum(4 * n - int(NF4_BYTES * n) for n in values)
    assert packed.training.fixed - whole.training.fixed == 4 * max(values)
    assert packed.training.each == whole.training.each
