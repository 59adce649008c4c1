"""diffusers' caches and IP-Adapters on fused transformers, and what unfusing leaves of hooks that came meanwhile."""

import weakref

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_layerwise_casting,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from fused_models import build, handed_over, inputs, off

from fdfo_engine.models.fused import fuse, fusion_refusals, unfuse


@pytest.fixture(params=["sd35-medium", "flux"])
def variant(request):
    return request.param


TIMES = [1000, 800, 600, 400]
clock = {"time": TIMES[0]}
BROADCAST = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 900),
    "spatial_attention_block_identifiers": ("transformer_blocks",),
    "current_timestep_callback": lambda: clock["time"],
}
FASTER = BROADCAST | {
    "tensor_format": "BCHW", "is_guidance_distilled": True, "attention_weight_callback": lambda _: 0.3,
}  # fmt: skip
MAG = {"threshold": 10.0, "max_skip_steps": 1, "retention_ratio": 0.0, "mag_ratios": [1.0] * 9}
SEER = {
    "cache_interval": 2, "disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32,
    "cache_identifiers": [r".*transformer_blocks\.\d+\.attn"],
}  # fmt: skip
CACHES = {
    "fbc_": (apply_first_block_cache, FirstBlockCacheConfig, {"threshold": 100.0}),
    "mag_cache_": (apply_mag_cache, MagCacheConfig, MAG | {"num_inference_steps": 9}),
    "taylorseer_cache": (apply_taylorseer_cache, TaylorSeerCacheConfig, SEER),
    "pyramid_attention_broadcast": (
        apply_pyramid_attention_broadcast, PyramidAttentionBroadcastConfig, BROADCAST,
    ),
    "faster_cache_block": (apply_faster_cache, FasterCacheConfig, FASTER),
}  # fmt: skip


@torch.no_grad()
def denoised(model, variant):
    """Outputs of a few steps, each on what the last one gave; caches are told that all are of one prompt."""
    given, found = inputs(variant, batch=2), []
    for clock["time"] in TIMES:
        _set_cache_context(model, CacheContext("cond"))
        found.append(model(**given, return_dict=False)[0])
        given["hidden_states"] = given["hidden_states"] + 0.1 * found[-1]
    return torch.stack(found)


def cached(model, name):
    apply, config, settings = CACHES[name]
    apply(model, config(**settings))
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    return model


CASES = [(variant, name) for variant in ("sd35-medium", "flux", "qwen-image") for name in CACHES]
CASES.remove(("sd35-medium", "fbc_"))  # diffusers' own fails: SD3's last block has no text to add


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_a_cache_skips_what_it_skips_in_diffusers(variant, name, capsys):
    model = build(variant)
    fuse(model)
    fused = denoised(model, variant)
    exact = denoised(cached(build(variant), name), variant)
    assert off(exact, fused) > 1e-4, "it skips nothing here"
    assert off(denoised(cached(model, name), variant), exact) <= 1e-5
    (line,) = handed_over(capsys.readouterr().out)
    assert name in line


@pytest.mark.parametrize("name", CACHES)
def test_a_model_with_a_cache_is_not_fused(variant, name):
    assert any(name in reason for reason in fusion_refusals(cached(build(variant), name)))


def test_unfusing_leaves_a_cache_in_place(variant):
    model = build(variant)
    fuse(model)
    exact = denoised(cached(build(variant), "mag_cache_"), variant)
    unfuse(cached(model, "mag_cache_"))
    assert torch.equal(denoised(model, variant), exact)
    own = denoised(build(variant), variant)
    for module in model.modules():
        for name in list(getattr(module, "_diffusers_hook", HookRegistry(module)).hooks):
            module._diffusers_hook.remove_hook(name, recurse=False)
    assert torch.equal(denoised(model, variant), own), "what the hooks leave is diffusers' own forward"
    assert not fusion_refusals(model)
    fuse(model)
    assert off(denoised(model, variant), own) <= 1e-5


def ip_adapted(model, variant):
    """With an IP-Adapter's processors, and what a pipeline hands them of an image."""
    torch.manual_seed(7)
    for name, module in model.named_modules():
        if name.endswith(".attn") and not name.startswith("single"):
            size = {"hidden_size": 16, "ip_hidden_states_dim": 12, "head_dim": 8, "timesteps_emb_dim": 10}
            module.set_processor(
                FluxIPAdapterAttnProcessor(16, 12, scale=[0.5])
                if variant == "flux"
                else SD3IPAdapterJointAttnProcessor2_0(**size, scale=0.5)
            )
    image = torch.randn(3, 4, 12)
    return {"ip_hidden_states": [image]} if variant == "flux" else {
        "ip_hidden_states": image, "temb": torch.randn(3, 10),
    }  # fmt: skip


@torch.no_grad()
def test_an_ip_adapter(variant, capsys):
    plain, model = build(variant), build(variant)
    fuse(model)
    fused = model(**inputs(variant)).sample
    given = ip_adapted(plain, variant)
    exact = plain(**inputs(variant), joint_attention_kwargs=dict(given)).sample
    ip_adapted(model, variant)
    for _ in range(2):
        assert off(model(**inputs(variant), joint_attention_kwargs=dict(given)).sample, exact) <= 1e-5
    assert off(exact, fused) > 1e-3
    said = "\n".join(handed_over(capsys.readouterr().out))
    assert said.count("an attention processor is a") == 1


@torch.no_grad()
def test_an_attention_mask(capsys):
    """Arguments for the attention alone, on a model that fits: each block hands the call on. SD3's ignores them."""
    variant = "flux"
    mask = torch.zeros(1, 1, 1, 5 + 16)
    mask[..., :2] = -torch.inf
    given = {"joint_attention_kwargs": {"attention_mask": mask}}
    model = build(variant).requires_grad_(False)
    exact = model(**inputs(variant), **given).sample
    fuse(model)
    for _ in range(2):
        assert off(model(**inputs(variant), **given).sample, exact) <= 1e-5
    assert off(model(**inputs(variant)).sample, exact) > 1e-3
    (line,) = handed_over(capsys.readouterr().out)
    assert "joint_attention_kwargs has attention_mask" in line


@torch.no_grad()
def test_float8_storage_lets_the_shared_buffers_go(variant):
    """Layerwise casting is there to save memory: the buffers that fused products read must not stay beside it."""
    model = build(variant).requires_grad_(False)
    fuse(model)
    model(**inputs(variant))
    weights = [weakref.ref(block.attn.to_q.weight.untyped_storage()) for block in model.transformer_blocks]
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    model(**inputs(variant))
    assert not [storage for storage in weights if storage() is not None]
