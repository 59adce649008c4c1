"""What fusing leaves of a diffusers model: its files, its copies, its own forward afterwards; and what it refuses."""

import copy
import re

import pytest
import torch
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from fused_models import (
    EVERYWHERE,
    FAMILIES,
    VARIANTS,
    adapted,
    assert_equal_runs,
    build,
    forward_backward,
    handed_over,
    inputs,
)
from peft import LoraConfig
from safetensors.torch import load_file

from fdfo_engine.models.fused import fuse, fused_blocks, fusion_refusals, is_fused, unfuse
from fdfo_engine.models.fused.fuse import own_forwards
from fdfo_engine.runtime.errors import UsageError


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.mark.parametrize("train", ["lora", "full", "frozen"])
def test_unfuse_gives_the_original(variant, train):
    model = build(variant)
    model = {"lora": adapted, "full": lambda m: m, "frozen": lambda m: m.requires_grad_(False)}[train](model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        exact = model(**inputs(variant)).sample
        fuse(model)
        assert is_fused(model)
        assert len(fused_blocks(model)) == (4 if variant == "flux" else 2)
        model(**inputs(variant))
        unfuse(model)
        assert torch.equal(model(**inputs(variant)).sample, exact)
    assert not is_fused(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    unfuse(model)  # and once more is nothing


def test_frozen_weights_lie_together_and_trained_ones_do_not(variant):
    model = build(variant)
    fuse(model)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    fuse(model.requires_grad_(False))
    shared = len(list(model.parameters())) - len({p.untyped_storage().data_ptr() for p in model.parameters()})
    assert shared > 20
    fuse(model, rehome=False)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_a_saved_model_loads_as_it_was(variant, tmp_path):
    model = build(variant).requires_grad_(False)
    exact = {name: t.clone() for name, t in model.state_dict().items()}
    fuse(model)
    model.save_pretrained(tmp_path)
    loaded = FAMILIES[variant].from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == exact.keys()
    assert all(torch.equal(t, exact[name]) for name, t in loaded.items())


def test_its_lora_is_saved_and_loaded(variant, tmp_path):
    model = adapted(build(variant))
    fuse(model)
    model.save_lora_adapter(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    ours = {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".lora_" in n}
    assert saved.keys() == ours.keys()
    assert all(torch.equal(t, ours[name]) for name, t in saved.items())
    fresh = build(variant)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        exact = model(**inputs(variant)).sample
        fuse(fresh)
        assert (fresh(**inputs(variant)).sample - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_loading_weights_into_a_fused_model(variant):
    model, other = build(variant).requires_grad_(False), build(variant, seed=9)
    fuse(model)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        exact = other(**inputs(variant)).sample
        assert (model(**inputs(variant)).sample - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("change", ["unfrozen", "moved", "copied", "adapted"])
def test_changes_after_fusing_are_noticed(variant, change):
    model = build(variant).requires_grad_(False)
    fuse(model)
    if change == "unfrozen":
        model.requires_grad_(True)
    elif change == "moved":
        model.double().float()
    elif change == "copied":
        original, model = model, copy.deepcopy(model)
        with torch.no_grad():
            for p in original.parameters():
                p.zero_()
    else:
        adapted(model, EVERYWHERE)
    if change in ("moved", "copied"):
        model.proj_out.requires_grad_(True)
    found = forward_backward(model, inputs(variant))
    unfuse(model)
    assert_equal_runs(found, forward_backward(model, inputs(variant)))


def lora(model, **settings):
    model.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False, **settings), "default")


def two_adapters(model):
    lora(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]), "second")
    model.set_adapters(["default", "second"])


def merged(model):
    lora(model)
    model.fuse_lora()


def chunked(model):
    model.enable_forward_chunking(1)


BARE_NORM = torch.nn.LayerNorm(8, eps=1e-6, elementwise_affine=False)
REFUSED = {
    "LoRA with dropout": (lambda m: lora(m, lora_dropout=0.1), "dropout is 0.1"),
    "DoRA": (lambda m: lora(m, use_dora=True), "adapter 'default' is a DoraLinearVariant, not plain LoRA"),
    "biased LoRA": (lambda m: lora(m, lora_bias=True), "adapter 'default' has a bias"),
    "two adapters": (two_adapters, "several adapters are active at once: default, second"),
    "merged": (merged, "an adapter is merged into its weights"),
    "offloaded": (lambda m: setattr(m, "_hf_hook", object()), "accelerate's hooks offload it"),
    "chunks": (chunked, "forward chunking is on"),
    "activation": (lambda m: setattr(m.transformer_blocks[0].ff.net[0], "approximate", "none"), "not tanh-GELU"),
    "processor": (
        lambda m: m.set_attn_processor(FusedJointAttnProcessor2_0()),
        "an attention processor is a FusedJointAttnProcessor2_0",
    ),
    "norm": (lambda m: setattr(m.transformer_blocks[0].attn, "norm_q", BARE_NORM), "not an RMSNorm"),
    "eps": (lambda m: setattr(m.transformer_blocks[0].attn.norm_q, "eps", 1e-5), "eps = 1e-05"),
    "token norm": (lambda m: setattr(m.transformer_blocks[0], "norm2", torch.nn.LayerNorm(16)), "a norm of tokens is"),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_its_reason(name):
    change, message = REFUSED[name]
    model = build("sd35-medium")
    assert not fusion_refusals(model)
    change(model)
    reasons = fusion_refusals(model)
    assert len(reasons) == 1
    assert message in reasons[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        fuse(model)
    assert not is_fused(model)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("name", ["DoRA", "biased LoRA", "two adapters", "merged"])
def test_an_adapter_that_stops_fitting_is_noticed(name, capsys):
    """The call is diffusers' own then; where fused blocks are required it is an error."""
    change, message = REFUSED[name]
    plain, model, strict = (build("sd35-medium") for _ in range(3))
    fuse(model)
    fuse(strict, required=True)
    for each in (plain, model, strict):
        torch.manual_seed(0)
        change(each)
    found, exact = (m(**inputs("sd35-medium")).sample for m in (model, plain))
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert message in handed_over(capsys.readouterr().out)[0]
    with pytest.raises(UsageError, match=re.escape(message)):
        strict(**inputs("sd35-medium"))


def test_an_adapter_of_the_models_short_dtype_runs():
    model = build("sd35-medium").bfloat16()
    lora(model)
    model.bfloat16()
    batch = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs("sd35-medium").items()}
    exact = model(**batch, return_dict=False)[0]
    fuse(model)
    found = model(**batch, return_dict=False)[0]
    assert (found - exact).float().norm() < 1e-2 * exact.float().norm()


def test_it_computes_as_diffusers_for_a_while(variant):
    model, batch = build(variant), inputs(variant)
    exact = model(**batch, return_dict=False)[0]
    fuse(model)
    fused = model(**batch, return_dict=False)[0]
    with own_forwards(model):
        assert torch.equal(model(**batch, return_dict=False)[0], exact)
    assert torch.equal(model(**batch, return_dict=False)[0], fused)


def test_what_qwen_image_alone_may_have_is_refused():
    """Tokens with modulations of their own; and attention without a mask, which hides the padding of prompts."""
    model = build("qwen-image")
    with pytest.raises(ValueError, match="attention is 'flash': it takes no mask"):
        fuse(model, attention="flash")
    model.transformer_blocks[1].zero_cond_t = True
    assert fusion_refusals(model) == ["its tokens have modulations of their own (zero_cond_t)"]


def test_other_arguments_are_refused():
    assert "it is a Linear" in fusion_refusals(torch.nn.Linear(2, 2))[0]
    with pytest.raises(ValueError, match="recompute is 'some'; it takes one of none, fc1, block"):
        fuse(build("sd3"), recompute="some")
    with pytest.raises(ValueError, match="attention is 'fast': there are auto, sdpa"):
        fuse(build("sd3"), attention="fast")
