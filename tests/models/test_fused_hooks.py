"""What other people put on a fused transformer: it computes as diffusers does, says so once, and is fused again after.

The truth is diffusers' own transformer of the same weights, with the same thing put on it.
"""

import copy
import re

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from fused_models import adapted, assert_equal_runs, build, forward_backward, handed_over, inputs, off
from peft import LoraConfig
from torch.nn.utils import parametrize, prune

from fdfo_engine.models.fused import fuse, fusion_refusals, is_fused
from fdfo_engine.runtime.errors import UsageError


@pytest.fixture(params=["sd35-medium", "flux"])
def variant(request):
    return request.param


def first(model):
    return model.transformer_blocks[0]


def doubled(module, args, output):
    return 2 * output


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


class Twice(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def on_a_norm(model):
    first(model).norm1.linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def on_gradients(model):
    first(model).ff.net[2].register_full_backward_hook(lambda module, found, given: tuple(2 * g for g in found))


def before_gradients(model):
    first(model).ff.net[2].register_full_backward_pre_hook(lambda module, given: tuple(2 * g for g in given))


def on_a_block(model):
    first(model).register_forward_hook(lambda module, args, output: (output[0], 2 * output[1]))


def in_an_adapter(model):
    first(adapted(model)).attn.to_k.lora_A["default"].register_forward_hook(doubled)


def replaced_forward(model):
    layer = first(model).ff.net[2]
    layer.forward = lambda x: 2 * torch.nn.functional.linear(x, layer.weight, layer.bias)


def replaced_attention(model):
    first(model).attn = copy.deepcopy(model.transformer_blocks[1].attn)


def a_block_less(model):
    model.transformer_blocks = model.transformer_blocks[1:]


def two_adapters(model):
    adapted(model)
    config = LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter(config, "second")
    model.set_adapters(["default", "second"])


def merged(model):
    adapted(model).fuse_lora()
    model.proj_out.requires_grad_(True)


ARRIVALS = {
    "forward hook": (lambda m: first(m).attn.to_v.register_forward_hook(doubled), "a Linear has a hook: doubled in"),
    "pre-hook": (on_a_norm, "in _forward_pre_hooks"),
    "backward hook": (on_gradients, "in _backward_hooks"),
    "backward pre-hook": (before_gradients, "in _backward_pre_hooks"),
    "hook on a block": (on_a_block, "TransformerBlock has a hook"),
    "hook on the last norm": (
        lambda m: m.norm_out.linear.register_forward_hook(doubled), "a Linear has a hook: doubled in _forward_hooks",
    ),
    "hook in an adapter": (in_an_adapter, "a Linear has a hook: doubled in _forward_hooks"),
    "pruned": (lambda m: prune.l1_unstructured(first(m).attn.to_v, "weight", 0.5), "a Linear has a hook: L1"),
    "spectral norm": (lambda m: torch.nn.utils.spectral_norm(first(m).attn.to_v), "a hook: SpectralNorm"),
    "weight norm": (
        lambda m: torch.nn.utils.parametrizations.weight_norm(first(m).ff.net[2]), "of a Linear are parametrized",
    ),
    "parametrized norm": (
        lambda m: parametrize.register_parametrization(first(m).attn.norm_q, "weight", Twice()), "RMSNorm are param",
    ),
    "accelerate": (lambda m: add_hook_to_module(first(m).ff, Doubled()), "accelerate's hooks offload parts of it"),
    "replaced forward": (replaced_forward, "the forward of a Linear was replaced"),
    "replaced layer": (replaced_attention, "a layer was replaced after fusing"),
    "a block less": (a_block_less, "its blocks are others than those that were fused"),
    "dropout": (lambda m: setattr(first(m).ff.net[1], "p", 0.5), "dropout is 0.5"),
    "two adapters": (two_adapters, "several adapters are active at once: default, second"),
    "merged adapter": (merged, "an adapter is merged into its weights"),
    "chunks": (lambda m: first(m).set_chunk_feed_forward(1, 0), "forward chunking is on"),
    "layerwise casting": (
        lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "a Linear: layerwise_casting",
    ),
    "offloaded blocks": (
        lambda m: m.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1), "group_offloading",
    ),
    "offloaded layers": (
        lambda m: m.enable_group_offload("cpu", offload_type="leaf_level"), "of diffusers stand on a Linear: group_off",
    ),
}  # fmt: skip
FLUX_HAS_NOT = {"chunks"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ARRIVALS)
def test_what_arrives_after_fusing_computes_as_in_diffusers(variant, name, capsys):
    if variant == "flux" and name in FLUX_HAS_NOT:
        pytest.skip("SD3's alone")
    change, reason = ARRIVALS[name]
    plain, model = build(variant), build(variant)
    fuse(model)
    before = forward_backward(model, inputs(variant))
    for each in (plain, model):
        torch.manual_seed(0)
        change(each)
    exact = forward_backward(plain, inputs(variant))
    assert_equal_runs(forward_backward(model, inputs(variant)), exact)
    forward_backward(model, inputs(variant))
    assert is_fused(model)
    (line,) = handed_over(capsys.readouterr().out)
    assert reason in line
    if name not in ("dropout", "chunks", "offloaded blocks", "offloaded layers"):
        differs = off(exact[0], before[0]) > 1e-4 or exact[1].keys() != before[1].keys()
        assert differs or any(off(exact[1][name], g) > 1e-4 for name, g in before[1].items())


def test_a_hook_inside_a_qwen_image_block(capsys):
    plain, model = build("qwen-image"), build("qwen-image")
    fuse(model)
    for each in (plain, model):
        first(each).txt_mlp.net[2].register_forward_hook(doubled)
    exact = forward_backward(plain, inputs("qwen-image"))
    assert_equal_runs(forward_backward(model, inputs("qwen-image")), exact)
    (line,) = handed_over(capsys.readouterr().out)
    assert "a Linear has a hook: doubled in" in line


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ARRIVALS)
def test_what_is_there_before_fusing_is_refused(variant, name):
    if (variant == "flux" and name in FLUX_HAS_NOT) or name in ("replaced layer", "a block less"):
        pytest.skip("nothing to refuse")
    change, reason = ARRIVALS[name]
    model = build(variant)
    change(model)
    assert any(reason in found for found in fusion_refusals(model))
    with pytest.raises(ValueError, match=re.escape(reason)):
        fuse(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_a_layer_of_another_dtype_is_refused(variant, dtype):
    model = build(variant)
    first(model).attn.to_q.to(dtype)
    (reason,) = fusion_refusals(model)
    assert reason == f"weights of a block are {str(dtype).removeprefix('torch.')} and float32" or (
        reason == f"weights of a block are float32 and {str(dtype).removeprefix('torch.')}"
    )


def test_a_weight_that_is_no_plain_tensor_is_refused(variant):
    class Packed(torch.Tensor):
        pass

    model = build(variant)
    layer = first(model).attn.to_q
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed))
    assert fusion_refusals(model) == ["a weight is a Packed"]


def test_a_hook_on_all_modules(variant, capsys):
    model, given = build(variant), inputs(variant)
    fuse(model)
    fused = forward_backward(model, given)
    seen = []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        forward_backward(model, given)
    assert first(model).attn.to_q in seen
    assert len(handed_over(capsys.readouterr().out)) == 1
    assert torch.equal(forward_backward(model, given)[0], fused[0])


@torch.no_grad()
def test_a_removed_hook_leaves_a_fused_model(variant, capsys):
    model, given = build(variant), inputs(variant)
    fuse(model)
    fused, seen = model(**given).sample, []
    for _ in range(2):
        handle = first(model).attn.to_q.register_forward_hook(lambda *_: seen.append(1))
        model(**given)
        handle.remove()
        assert torch.equal(model(**given).sample, fused)
    add_hook_to_module(first(model), Counting(seen))
    model(**given)
    remove_hook_from_module(first(model))
    assert torch.equal(model(**given).sample, fused)
    assert len(seen) == 3
    assert len(handed_over(capsys.readouterr().out)) == 2, "each reason once"


class Counting(ModelHook):
    def __init__(self, seen):
        self.seen = seen

    def post_forward(self, module, output):
        self.seen.append(1)
        assert len(output) == 2, "a block's own outputs"
        return output


@pytest.mark.parametrize("name", ["forward hook", "merged adapter", "layerwise casting", "a block less"])
def test_required_blocks_end_in_a_readable_error(name):
    change, reason = ARRIVALS[name]
    model = build("sd35-medium")
    fuse(model, required=True)
    model(**inputs("sd35-medium"))
    change(model)
    message = "model.fused = true: this model does not fit the fused blocks any more: .*" + re.escape(reason)
    with pytest.raises(UsageError, match=message):
        model(**inputs("sd35-medium"))
