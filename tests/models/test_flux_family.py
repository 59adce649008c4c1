"""The FLUX.1 family against diffusers' own pipeline, with random weights."""

import family_checks as checks
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from family_checks import CPU, PROMPTS, Tiny, largest
from tiny_flux import build_tiny_flux

from fdfo_engine import Engine
from fdfo_engine.models.flux import FluxModel
from fdfo_engine.models.fused import is_fused
from fdfo_engine.models.lora import add_lora, trainable
from fdfo_engine.models.native_lora import to_native
from fdfo_engine.models.packed_model import pack, unpack
from fdfo_engine.models.registry import load_model
from fdfo_engine.planning.footprint import blank_footprint
from fdfo_engine.runtime.errors import UsageError

JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
GUIDANCE = [1.0, 4.5]


def call(embedded):
    def run(pipeline, prompts, noise, guidance, **settings):
        latents = FluxPipeline._pack_latents(noise, *noise.shape)
        return pipeline(
            prompts, negative_prompt=[""] * len(prompts), true_cfg_scale=guidance, guidance_scale=embedded,
            latents=latents, max_sequence_length=16, **settings,
        ).images  # fmt: skip

    return run


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    folder = build_tiny_flux(tmp_path_factory.mktemp("flux"))
    return Tiny(folder, FluxPipeline, call(2.0), {"sampling": {"embedded_guidance": 2.0}})


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    folder = build_tiny_flux(tmp_path_factory.mktemp("schnell"), schnell=True)
    return Tiny(folder, FluxPipeline, call(0.0), {})


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_images_are_the_pipelines_own(request, tmp_path, kind, guidance):
    tiny = request.getfixturevalue(kind)
    checks.check_generation_is_the_pipelines_own(tiny, tmp_path / "a", guidance)
    checks.check_rollout_without_churn_is_the_pipelines_own(tiny, tmp_path / "b", guidance)


def test_guidance_and_prompts_matter(dev, tmp_path):
    checks.check_guidance_and_prompts_matter(dev, tmp_path)


def test_embedded_guidance_is_the_pipelines_default_unless_set(dev, tmp_path, capsys):
    default = Engine(dev.config(tmp_path / "a", sampling={"embedded_guidance": None}))
    assert "sampling.embedded_guidance: 3.5" in capsys.readouterr().out
    images = default.generate(PROMPTS)
    own = Tiny(dev.folder, FluxPipeline, call(3.5), {})
    assert largest(images - own.generated(own.pipeline(), 1.0)) < 1e-5
    assert largest(images - Engine(dev.config(tmp_path / "b")).generate(PROMPTS)) > 1e-4


@pytest.mark.parametrize("guidance", [GUIDANCE[0], *(pytest.param(g, marks=pytest.mark.slow) for g in GUIDANCE[1:])])
def test_training(dev, tmp_path, guidance):
    checks.check_replayed_velocities_are_the_sampled_ones(dev, tmp_path / "a", guidance)
    checks.check_resume_is_bit_for_bit(dev, tmp_path / "b", guidance)
    checks.check_kl_is_of_the_guided_velocities(dev, tmp_path / "c", guidance)


def test_a_bfloat16_run(dev, tmp_path):
    checks.check_a_bfloat16_run(dev, tmp_path)


@pytest.mark.parametrize(("train", "guidance"), [("lora", 1.0), ("lora", 4.5), ("full", 1.0)])
def test_export(dev, tmp_path, train, guidance):
    checks.check_export_is_the_same_in_diffusers(dev, tmp_path, train, guidance)


def test_merged_export(dev, tmp_path):
    checks.check_merged_export_is_the_same_in_diffusers(dev, tmp_path)


def test_lora_is_on_every_attention_projection(dev, tmp_path):
    model = load_model(dev.config(tmp_path), CPU)
    double = {f"transformer_blocks.{block}.attn.{part}" for block in (0, 1) for part in JOINT}
    single = {f"single_transformer_blocks.{block}.attn.{part}" for block in (0, 1) for part in JOINT[:3]}
    assert checks.adapted_modules(model) == double | single


def test_fused_blocks_give_the_same_velocity(dev, tmp_path):
    fused, plain = (load_model(dev.config(tmp_path, model={"fused": on}), CPU) for on in (True, False))
    assert is_fused(fused.network)
    assert not is_fused(plain.network)
    x, times = torch.randn(3, *fused.latent_shape), torch.tensor([990.0, 400.0, 20.0])
    rows = plain.encode_prompt(PROMPTS[0]).rows(torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        exact = plain.velocity(plain.network, x, times, rows)
        assert largest(fused.velocity(fused.network, x, times, rows) - exact) < 1e-5 * largest(exact)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in ({"train": "full"}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"})
        ),
    ],
    ids=str,
)
def test_sizes_from_configs_alone(dev, tmp_path, settings):
    checks.check_blank_sizes_are_the_loaded_models(dev, tmp_path, **settings)


def test_prompts_come_back_from_the_disk(dev, tmp_path):
    checks.check_prompts_come_back_from_the_disk(dev, tmp_path)


def test_packing_is_the_pipelines_own():
    latents = torch.randn(3, 4, 6, 10)
    tokens = FluxPipeline._pack_latents(latents, 3, 4, 6, 10)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, 6, 10), latents)


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        ("schnell", {"sampling": {"embedded_guidance": 3.5}}, "sampling.embedded_guidance = 3.5: this model has no"),
        ("schnell", {"sampling": {"steps": 8}}, "sampling.steps = 8: this model takes 1 to 4 steps"),
        ("dev", {"model": {"max_sequence_length": 0}}, "model.max_sequence_length = 0"),
    ],
)
def test_what_does_not_fit_is_refused(request, tmp_path, kind, sections, message):
    config = request.getfixturevalue(kind).config(tmp_path, **sections)
    for use in (lambda: load_model(config, CPU), lambda: blank_footprint(config)):
        with pytest.raises(UsageError, match=message):
            use()


def test_a_wrong_size_is_refused(tmp_path):
    """As large as FLUX.1's own VAE makes it: patches of 2 x 2 latents of 8 x 8 pixels."""
    tiny = Tiny(build_tiny_flux(tmp_path / "flux", vae_levels=4), FluxPipeline, None, {})
    load_model(tiny.config(tmp_path / "run", model={"height": 32}), CPU)
    with pytest.raises(UsageError, match=r"model.height = 24: this model takes a multiple of 16$"):
        load_model(tiny.config(tmp_path / "run", model={"height": 24}), CPU)


def test_a_transformer_that_wants_an_image_is_refused(tmp_path):
    fill = Tiny(build_tiny_flux(tmp_path / "fill", in_channels=32), FluxPipeline, None, {})
    with pytest.raises(UsageError, match=r"takes 32 channels .* wants an image beside the prompt"):
        load_model(fill.config(tmp_path / "run"), CPU)


def test_a_comfyui_export_adds_the_same_to_each_weight(dev, tmp_path):
    engine, _, tensors = checks.comfyui_export(dev, tmp_path)
    exact = checks.changes(engine.trainer.weights(), scale=2.0)
    layers = {name.split(".")[0].removeprefix("lora_unet_") for name in tensors}
    parts = ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")
    assert layers == {f"double_blocks_{b}_{p}" for b in (0, 1) for p in parts} | {
        f"single_blocks_{b}_linear1" for b in (0, 1)
    }
    qkv = torch.cat([exact[f"transformer_blocks.1.attn.{part}"] for part in JOINT[4:7]])
    assert largest(checks.native_change(tensors, "double_blocks_1_txt_attn_qkv") - qkv) < 1e-6 * largest(qkv)
    qkv = torch.cat([exact[f"single_transformer_blocks.0.attn.{part}"] for part in JOINT[:3]])
    linear1 = checks.native_change(tensors, "single_blocks_0_linear1")
    assert largest(linear1[: len(qkv)] - qkv) < 1e-6 * largest(qkv)
    assert len(linear1) == len(qkv) + 4 * 16
    assert largest(linear1[len(qkv) :]) == 0


@pytest.mark.slow
def test_diffusers_converts_a_comfyui_lora_back():
    """Its own conversion knows FLUX.1's real width only: one block of each kind, on the meta device."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    add_lora(network, rank=4, alpha=4.0, targets=FluxModel.lora_targets, seed=0)
    generator = torch.Generator().manual_seed(0)
    names = [(name.replace(".default.", "."), p.shape) for name, p in trainable(network)]
    weights = {name: torch.randn(shape, generator=generator) for name, shape in names}
    native = to_native(weights, network, FluxModel.native_layers)
    found, exact = checks.changes(FluxPipeline.lora_state_dict(dict(native))), checks.changes(weights)
    assert len(exact) == len(JOINT) + 3
    for name, change in exact.items():
        assert largest(found[name] - change) < 1e-6 * largest(change), name
    assert all(largest(found[name]) == 0 for name in found.keys() - exact.keys())


def test_a_comfyui_export_that_cannot_be_right_is_refused(dev, tmp_path, monkeypatch):
    checks.check_comfyui_refusals(dev, tmp_path, monkeypatch, "ff.net.2")
