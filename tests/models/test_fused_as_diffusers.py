"""What diffusers asks of its own transformers, asked of fused ones: the cases of its model tests."""

import inspect

import pytest
import torch
from diffusers.training_utils import EMAModel
from fused_models import (
    ATTENTION_KWARGS,
    CONTROLNET,
    FAMILIES,
    SD3,
    VARIANTS,
    adapted,
    assert_equal_runs,
    build,
    forward_backward,
    inputs,
    off,
)

from fdfo_engine.models.fused import fuse


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def fused(variant, **settings):
    model = build(variant)
    fuse(model, **settings)
    return model


def assert_same(found, exact):
    assert found.shape == exact.shape
    assert off(found, exact) <= 1e-5


@torch.no_grad()
def test_two_calls_agree_as_tuple_and_as_dict(variant):
    model, given = fused(variant), inputs(variant)
    sample = model(**given).sample
    assert sample.shape == given["hidden_states"].shape
    assert torch.isfinite(sample).all()
    assert torch.equal(model(**given)[0], sample)
    assert torch.equal(model(**given, return_dict=False)[0], sample)


def test_its_signature_is_the_classs(variant):
    assert inspect.signature(fused(variant).forward).parameters.keys() == (
        inspect.signature(FAMILIES[variant].forward).parameters.keys() - {"self"}
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", SD3)
def test_skipped_layers(variant):
    given = inputs(variant)
    exact = build(variant)(**given, skip_layers=[0]).sample
    model = fused(variant)
    assert_same(model(**given, skip_layers=[0]).sample, exact)
    assert off(model(**given).sample, exact) > 1e-3


@torch.no_grad()
def test_a_controlnets_residuals(variant):
    given, draw = inputs(variant), torch.Generator().manual_seed(5)
    tokens = (3, 16, 16)
    given[CONTROLNET[variant]] = [torch.randn(tokens, generator=draw) for _ in range(2)]
    assert_same(fused(variant)(**given).sample, build(variant)(**given).sample)


@torch.no_grad()
def test_a_loras_scale(variant):
    given = inputs(variant) | {ATTENTION_KWARGS[variant]: {"scale": 0.5}}
    exact = adapted(build(variant))(**given).sample
    model = adapted(build(variant))
    fuse(model)
    assert_same(model(**given).sample, exact)
    assert off(model(**inputs(variant)).sample, exact) > 1e-3


@torch.no_grad()
def test_position_ids_of_each_sample():
    """An older form, which diffusers still takes and warns of."""
    given = inputs("flux")
    model = fused("flux")
    exact = model(**given).sample
    old = {name: given[name][None].expand(3, -1, -1) for name in ("img_ids", "txt_ids")}
    assert_same(model(**given | old).sample, exact)


@pytest.mark.parametrize("recompute", ["none", "fc1"])
def test_gradient_checkpointing_on_and_off(variant, recompute):
    model, given = fused(variant, recompute=recompute), inputs(variant)
    exact = forward_backward(model, given)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert_equal_runs(forward_backward(model.train(), given), exact)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    assert_equal_runs(forward_backward(model.eval(), given), exact)


def test_a_training_step_with_an_average(variant):
    model, given = fused(variant), inputs(variant)
    average = EMAModel(model.parameters())
    before = model(**given).sample.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(**given).sample.square().mean().backward()
    optimizer.step()
    average.step(model.parameters())
    with torch.no_grad():
        assert off(model(**given).sample, before) > 1e-6
        average.copy_to(model.parameters())
        fresh = build(variant)
        average.copy_to(fresh.parameters())
        assert_same(model(**given).sample, fresh(**given).sample)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_in_pieces_and_loaded(variant, dtype, tmp_path):
    model = fused(variant)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, given = FAMILIES[variant].from_pretrained(tmp_path, torch_dtype=dtype), inputs(variant, dtype=dtype)
    exact = loaded(**given).sample
    fuse(loaded)
    sample = loaded(**given).sample
    assert (sample.dtype, exact.dtype) == (dtype, dtype)
    assert off(sample.float(), exact.float()) <= (1e-5 if dtype == torch.float32 else 0.05)
    assert off(model(**inputs(variant)).sample, build(variant)(**inputs(variant)).sample) <= 1e-5
