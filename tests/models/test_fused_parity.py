"""Fused transformers against diffusers' own forward and backward."""

import copy
import sys

import pytest
import torch
from fused_models import (
    ATTENTION_KWARGS,
    CONTROLNET,
    EVERYWHERE,
    SD3,
    VARIANTS,
    adapted,
    as_float32,
    assert_as_close,
    assert_equal_runs,
    build,
    forward_backward,
    handed_over,
    in_float32,
    inputs,
)

from fdfo_engine.models.fused import families, fuse
from fdfo_engine.models.lora import adapters_off
from fdfo_engine.runtime.errors import UsageError

QUICK = ("sd35-medium",)
BY_INTERPRETER = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
TRAINED = {"lora": adapted, "lora everywhere": lambda m: adapted(m, EVERYWHERE), "full": lambda m: m}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.mark.parametrize("train", TRAINED)
def test_float32_is_diffusers_own(variant, train):
    model = TRAINED[train](build(variant))
    exact = forward_backward(model, inputs(variant))
    fuse(model)
    assert_equal_runs(forward_backward(model, inputs(variant)), exact)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_bfloat16_is_as_close_to_float32_as_diffusers_own(variant, train):
    model = build(variant, heads=4, head_size=16).bfloat16()
    model = TRAINED[train](model)
    given = inputs(variant, 8, dtype=torch.bfloat16)
    exact = forward_backward(in_float32(model), as_float32(given))
    plain = forward_backward(model, given)
    fuse(model)
    assert_as_close(forward_backward(model, given), plain, exact)


@pytest.fixture
def interpreted(monkeypatch):
    """Ops run their Triton kernels, by the interpreter."""
    monkeypatch.setattr("fdfo_engine.ops._dispatch.choose", lambda *_, **__: "triton")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("variant", BY_INTERPRETER)
@pytest.mark.parametrize("train", ["lora everywhere", pytest.param("full", marks=pytest.mark.slow)])
def test_triton_is_diffusers_own(variant, train):
    model = TRAINED[train](build(variant, layers=1, single_layers=1))
    exact = forward_backward(model, inputs(variant, 2))
    fuse(model)
    assert_equal_runs(forward_backward(model, inputs(variant, 2)), exact)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("variant", BY_INTERPRETER)
def test_training_rounds_as_the_rollout_does(variant):
    """To the bit, in bfloat16: on-policy log-ratios are 0."""
    model = TRAINED["lora everywhere"](build(variant, heads=4, head_size=16).bfloat16())
    given = inputs(variant, 2, dtype=torch.bfloat16)
    fuse(model, recompute="fc1")
    trained = model(**given).sample
    assert trained.requires_grad
    with torch.no_grad():
        assert torch.equal(model(**given).sample, trained)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("recompute", ["none", "fc1"])
def test_triton_in_bfloat16_is_as_close_to_float32_as_diffusers_own(variant, recompute):
    model = adapted(build(variant, heads=4, head_size=16).bfloat16())
    given = inputs(variant, 4, dtype=torch.bfloat16)
    exact = forward_backward(in_float32(model), as_float32(given))
    plain = forward_backward(model, given)
    fuse(model, recompute=recompute)
    assert_as_close(forward_backward(model, given), plain, exact)


@pytest.mark.parametrize("recompute", ["fc1", "block"])
@pytest.mark.parametrize("train", ["lora everywhere", "full"])
def test_recomputing_changes_nothing(variant, train, recompute):
    model = TRAINED[train](build(variant))
    fuse(model)
    exact = forward_backward(model, inputs(variant))
    fuse(model, recompute=recompute)
    assert_equal_runs(forward_backward(model, inputs(variant)), exact, limit=1e-6)


def test_a_row_does_not_depend_on_the_others(variant):
    model = adapted(build(variant))
    fuse(model)
    given = inputs(variant)
    others = copy.deepcopy(given)
    for name in given.keys() & {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"}:
        others[name][1:] = others[name][1:].flip(0) * 0.5
    with torch.no_grad():
        assert torch.equal(model(**given).sample[0], model(**others).sample[0])


def test_adapters_switched_off_are_the_base_model(variant):
    base = build(variant)
    model = adapted(copy.deepcopy(base))
    fuse(model)
    with torch.no_grad():
        exact, given = base(**inputs(variant)).sample, inputs(variant)
        with adapters_off(model):
            assert (model(**given).sample - exact).abs().max() <= 1e-5 * exact.abs().max()
        assert (model(**given).sample - exact).abs().max() > 1e-3 * exact.abs().max()


def test_blocks_take_what_diffusers_gives_them(variant):
    """ControlNets and LoRA scales take diffusers' own loop over blocks."""
    model = adapted(build(variant))
    given = inputs(variant) | {ATTENTION_KWARGS[variant]: {"scale": 0.5}}
    width = model.inner_dim
    residual = torch.randn(3, 16, width, generator=torch.Generator().manual_seed(4))
    given[CONTROLNET[variant]] = [residual]
    with torch.no_grad():
        exact = model(**given).sample
        fuse(model)
        assert (model(**given).sample - exact).abs().max() <= 1e-5 * exact.abs().max()


@torch.no_grad()
def test_other_attention_arguments_go_to_diffusers_or_are_refused(variant, capsys):
    if variant == "qwen-image":
        pytest.skip("its attention takes no other arguments, fused or not")
    name = ATTENTION_KWARGS[variant]
    model, given = build(variant), inputs(variant) | {name: {"ip_adapter_masks": None}}
    exact = model(**given).sample
    fuse(model)
    assert torch.equal(model(**given).sample, exact)
    assert f"{name} has ip_adapter_masks" in handed_over(capsys.readouterr().out)[0]
    fuse(model, required=True)
    with pytest.raises(UsageError, match=f"{name} has ip_adapter_masks"):
        model(**given)


def test_an_argument_that_no_block_has_is_named(variant, monkeypatch):
    model = build(variant)
    family = families.family_of(model)._replace(attention_arguments="joint_kwargs")
    monkeypatch.setattr(sys.modules["fdfo_engine.models.fused.fuse"], "family_of", lambda _: family)
    with pytest.raises(UsageError, match=r"attention_arguments = 'joint_kwargs': \w+.forward has no such argument"):
        fuse(model)


def test_skipped_layers(variant):
    if variant not in SD3:
        pytest.skip("SD3's argument alone")
    model = build(variant)
    with torch.no_grad():
        exact = model(**inputs(variant), skip_layers=[0]).sample
        fuse(model)
        found = model(**inputs(variant), skip_layers=[0]).sample
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
