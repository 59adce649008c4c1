"""The Qwen-Image family against diffusers' own pipeline, with random weights."""

import family_checks as checks
import pytest
import torch
from diffusers import QwenImagePipeline
from family_checks import CPU, PROMPTS, Tiny, largest
from tiny_qwen_image import build_tiny_qwen_image

from fdfo_engine.models.fused import is_fused
from fdfo_engine.models.packed_model import pack
from fdfo_engine.models.registry import load_model
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TOKENS = 24
GUIDANCE = [1.0, 4.5]


def call(pipeline, prompts, noise, guidance, **settings):
    latents = QwenImagePipeline._pack_latents(noise, *noise.shape)
    return pipeline(
        prompts, negative_prompt=[""] * len(prompts), true_cfg_scale=guidance, latents=latents,
        max_sequence_length=TOKENS, **settings,
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = build_tiny_qwen_image(tmp_path_factory.mktemp("qwen_image"))
    return Tiny(folder, QwenImagePipeline, call, {"model": {"max_sequence_length": TOKENS}})


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_images_are_the_pipelines_own(tiny, tmp_path, guidance):
    checks.check_generation_is_the_pipelines_own(tiny, tmp_path / "a", guidance)
    checks.check_rollout_without_churn_is_the_pipelines_own(tiny, tmp_path / "b", guidance)


def test_guidance_and_prompts_matter(tiny, tmp_path):
    checks.check_guidance_and_prompts_matter(tiny, tmp_path)


@pytest.mark.parametrize("guidance", [GUIDANCE[0], *(pytest.param(g, marks=pytest.mark.slow) for g in GUIDANCE[1:])])
def test_training(tiny, tmp_path, guidance):
    checks.check_replayed_velocities_are_the_sampled_ones(tiny, tmp_path / "a", guidance)
    checks.check_resume_is_bit_for_bit(tiny, tmp_path / "b", guidance)
    checks.check_kl_is_of_the_guided_velocities(tiny, tmp_path / "c", guidance)


def test_a_bfloat16_run(tiny, tmp_path):
    checks.check_a_bfloat16_run(tiny, tmp_path)


@pytest.mark.parametrize(("train", "guidance"), [("lora", 1.0), ("lora", 4.5), ("full", 1.0)])
def test_export(tiny, tmp_path, train, guidance):
    checks.check_export_is_the_same_in_diffusers(tiny, tmp_path, train, guidance)


def test_merged_export(tiny, tmp_path):
    checks.check_merged_export_is_the_same_in_diffusers(tiny, tmp_path)


@pytest.mark.parametrize("length", [TOKENS, 64])
def test_padding_does_not_change_the_velocity(tiny, tmp_path, length):
    """Rows of prompts of different lengths in one batch, against each prompt by itself, unpadded and unmasked."""
    model = load_model(tiny.config(tmp_path, model={"max_sequence_length": length}), CPU)
    rows = type(model.encode_prompt("")).cat([model.encode_prompt(prompt) for prompt in PROMPTS])
    lengths = rows.tensors["encoder_hidden_states_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    assert max(lengths) < length
    x, times, pipeline = torch.randn(4, *model.latent_shape), torch.tensor([990.0, 600.0, 300.0, 20.0]), tiny.pipeline()
    with torch.no_grad():
        found = pack(model.velocity(model.network, x, times, rows))
        for i, prompt in enumerate(PROMPTS):
            embeds, mask = pipeline.encode_prompt(prompt)
            assert mask is None
            exact = pipeline.transformer(
                hidden_states=pack(x)[i : i + 1], encoder_hidden_states=embeds, timestep=times[i : i + 1] / 1000,
                img_shapes=[[(1, 4, 4)]], return_dict=False,
            )[0]  # fmt: skip
            assert embeds.shape[1] == lengths[i]
            assert largest(found[i] - exact[0]) < 1e-5 * largest(exact)


def norm_rescaled(v, v_uncond, scale):
    """The pipeline's rule, token by token: a token is a patch of 2 x 2 over all channels."""
    combined = v_uncond + scale * (v - v_uncond)
    out = torch.empty_like(v)
    for row in range(0, v.shape[2], 2):
        for column in range(0, v.shape[3], 2):
            part = (slice(None), slice(None), slice(row, row + 2), slice(column, column + 2))
            sizes = [t[part].flatten(1).norm(dim=1)[:, None, None, None] for t in (v, combined)]
            out[part] = combined[part] * sizes[0] / sizes[1]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_guidance_rule_and_its_gradient(tiny, tmp_path, dtype):
    """One rounding, at the end, that gradients pass; against float64."""
    model = load_model(tiny.config(tmp_path), CPU)
    generator = torch.Generator().manual_seed(0)
    v, v_uncond, upstream = (torch.randn(3, 4, 8, 8, generator=generator).to(dtype) for _ in range(3))
    given = [t.clone().requires_grad_() for t in (v, v_uncond)]
    found, rest = model.guided(*given, 4.5)
    assert rest is None
    assert found.dtype == dtype
    exact_given = [t.double().requires_grad_() for t in (v, v_uncond)]
    exact = norm_rescaled(*exact_given, 4.5)
    rounding = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0
    limit = rounding + 1e-6
    assert largest(found - exact) <= limit * largest(exact)
    found.backward(upstream)
    exact.backward(upstream.double())
    for own, wanted in zip(given, exact_given, strict=True):
        assert largest(own.grad - wanted.grad) <= limit * largest(wanted.grad)


def test_lora_is_on_every_attention_projection(tiny, tmp_path):
    model = load_model(tiny.config(tmp_path), CPU)
    wanted = {f"transformer_blocks.{block}.attn.{part}" for block in (0, 1) for part in PROJECTIONS}
    assert checks.adapted_modules(model) == wanted


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
def test_sizes_from_configs_alone(tiny, tmp_path, settings):
    checks.check_blank_sizes_are_the_loaded_models(tiny, tmp_path, slack=1024, **settings)


def test_prompts_come_back_from_the_disk(tiny, tmp_path):
    checks.check_prompts_come_back_from_the_disk(tiny, tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sampling": {"embedded_guidance": 3.5}}, "sampling.embedded_guidance: the qwen_image family takes none"),
        ({"model": {"max_sequence_length": 0}}, "model.max_sequence_length = 0"),
        ({"model": {"attention": "flash"}}, "model.attention = flash: .* it takes no mask"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, tmp_path, sections, message):
    with pytest.raises((UsageError, EnvironmentProblem), match=message):
        load_model(tiny.config(tmp_path, **sections), CPU)


def test_fused_blocks_give_the_same_velocity(tiny, tmp_path):
    """Of prompts of different lengths, padded, in one batch; `auto` takes them too."""
    auto, plain = (load_model(tiny.config(tmp_path, model={"fused": fused}), CPU) for fused in ("auto", False))
    assert is_fused(auto.network)
    assert not is_fused(plain.network)
    rows = type(plain.encode_prompt("")).cat([plain.encode_prompt(prompt) for prompt in PROMPTS])
    x, times = torch.randn(4, *plain.latent_shape), torch.tensor([990.0, 600.0, 300.0, 20.0])
    with torch.no_grad():
        exact = plain.velocity(plain.network, x, times, rows)
        assert largest(auto.velocity(auto.network, x, times, rows) - exact) < 1e-5 * largest(exact)


def test_an_editing_transformer_is_refused(tmp_path):
    edit = build_tiny_qwen_image(tmp_path / "edit", zero_cond_t=True)
    config = Tiny(edit, None, None, {}).config(tmp_path / "run")
    with pytest.raises(UsageError, match="zero_cond_t of its transformer: it takes more than a prompt"):
        load_model(config, CPU)


def test_a_comfyui_export_is_read_by_diffusers_too(tiny, tmp_path):
    """diffusers converts such names itself for this family."""
    engine, file, tensors = checks.comfyui_export(tiny, tmp_path)
    assert "lora_unet_transformer_blocks_0_attn_to_out_0.lora_down.weight" in tensors
    base = tiny.generated(tiny.pipeline(), 4.5)
    fresh = tiny.pipeline()
    fresh.load_lora_weights(file)
    images = tiny.generated(fresh, 4.5)
    assert largest(images - engine.generate(PROMPTS, guidance_scale=4.5)) < 1e-5
    assert largest(images - base) > 1e-2


def test_a_comfyui_export_that_cannot_be_right_is_refused(tiny, tmp_path, monkeypatch):
    checks.check_comfyui_refusals(tiny, tmp_path, monkeypatch, None)
