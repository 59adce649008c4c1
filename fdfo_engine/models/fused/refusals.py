"""Which transformers the fused forwards compute exactly, and why others not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fdfo_engine.models.fused.families import FAMILIES, family_of
from fdfo_engine.models.fused.switch import is_own_forward
from fdfo_engine.models.fused.watch import HOOKS, own_layers, processor_of
from fdfo_engine.ops import MAX_HEAD_SIZE, NORM_EPS
from fdfo_engine.runtime.split_weights import brings_weights


def fusion_refusals(transformer: Any) -> list[str]:
    """Reasons why `fuse` does not take `transformer`, one sentence each; an empty list means it does."""
    if family_of(transformer) is None:
        known = ", ".join(family.transformer.__name__ for family in FAMILIES)
        return [f"it is a {type(transformer).__name__}; there are fused forwards for {known}"]
    reasons: dict[str, None] = {}
    if hasattr(transformer, "_hf_hook"):
        reasons["accelerate's hooks offload it"] = None
    elif not is_own_forward(transformer):
        reasons |= dict.fromkeys(_forward_refusals(transformer))
    for block in blocks_of(transformer):
        reasons |= dict.fromkeys(block_refusals(block))
    reasons |= dict.fromkeys(layer_refusals(transformer.norm_out))
    if transformer.config.attention_head_dim > MAX_HEAD_SIZE:
        reasons[f"heads are {transformer.config.attention_head_dim} wide; at most {MAX_HEAD_SIZE}"] = None
    return list(reasons)


def blocks_of(transformer: Any) -> list[nn.Module]:
    """All blocks, in the order in which they run."""
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]


def block_refusals(block: Any) -> Iterator[str]:
    """Reasons why a fused forward can't compute `block`."""
    families = [family for family in FAMILIES if type(block) in family.blocks]
    if not families:
        yield f"a block is a {type(block).__name__}"
        return
    if getattr(block, "_chunk_size", None) is not None:
        yield "forward chunking is on"
    if getattr(block, "zero_cond_t", False):
        yield "its tokens have modulations of their own (zero_cond_t)"
    for attention in _present(block, ("attn", "attn2")):
        yield from _attention_refusals(attention, families[0].processor)
    for module in _present(block, families[0].feed_forwards):
        yield from _feed_forward_refusals(module)
    yield from layer_refusals(block)


def _present(block: Any, names: Iterable[str]) -> list[Any]:
    """The parts of these names that a block has."""
    parts = [getattr(block, name, None) for name in names]
    return [part for part in parts if part is not None]


def _attention_refusals(attention: Any, expected: type) -> Iterator[str]:
    processor = processor_of(attention)
    if processor.kind is not expected:
        yield f"an attention processor is a {processor.kind.__name__}"
    if processor.backend is not None:
        yield f"set_attention_backend chose {processor.backend}; fused blocks take theirs from fuse"
    if processor.is_parallel:
        yield "attention is spread over devices"
    if processor.joins_projections:
        yield "projections are fused by diffusers; call unfuse_qkv_projections"
    for norm in _present(attention, ("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
        yield from _head_norm_refusals(norm)


def _head_norm_refusals(norm: Any) -> Iterator[str]:
    """Of a norm of queries or keys."""
    if not isinstance(norm, RMSNorm | nn.RMSNorm) or norm.weight is None or getattr(norm, "bias", None) is not None:
        yield f"a norm of queries or keys is {norm}, not an RMSNorm with a weight"
    elif norm.eps != NORM_EPS:
        yield f"a norm of queries or keys has eps = {norm.eps}, not {NORM_EPS}"


def _feed_forward_refusals(module: Any) -> Iterator[str]:
    if type(module) is not FeedForward or type(module.net[0]) is not GELU or module.net[0].approximate != "tanh":
        yield f"a feed-forward is {type(module).__name__} with {module.net[0]}, not tanh-GELU"


def layer_refusals(part: nn.Module) -> Iterator[str]:
    """What any layer inside a block may hold that a fused forward would pass over."""
    for module in part.modules():
        yield from _hook_refusals(module)
        if isinstance(module, nn.LayerNorm) and (module.elementwise_affine or module.eps != NORM_EPS):
            yield f"a norm of tokens is {module}, not without weights and with eps = {NORM_EPS}"
        if isinstance(module, nn.Dropout) and module.p > 0:
            yield f"dropout is {module.p}"
        if isinstance(module, BaseTunerLayer):
            yield from adapter_refusals(module)
        elif is_parametrized(module):
            yield f"weights of a {type_before_parametrizations(module).__name__} are parametrized"
        elif isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            yield f"a layer is a {type(module).__name__}"
    yield from _weight_refusals(own_layers(part))


def _hook_refusals(module: nn.Module) -> Iterator[str]:
    """What runs, or computes weights anew, only where the module itself is called."""
    if hasattr(module, "_hf_hook"):
        yield "accelerate's hooks offload parts of it"
    elif not is_own_forward(module):
        yield from _forward_refusals(module)
    for kind in HOOKS:
        for hook in getattr(module, kind).values():
            if not brings_weights(hook):  # a block brings those of all its layers
                name = getattr(hook, "__qualname__", type(hook).__name__)
                yield f"a {type(module).__name__} has a hook: {name} in {kind}"


def _forward_refusals(module: Any) -> Iterator[str]:
    """Of a module whose forward was replaced."""
    hooks = getattr(module, "_diffusers_hook", None)
    if hooks is not None and hooks.hooks:
        yield f"hooks of diffusers stand on a {type(module).__name__}: {', '.join(hooks.hooks)}"
    else:
        yield f"the forward of a {type(module).__name__} was replaced"


def _weight_refusals(layers: Iterable[nn.Module]) -> Iterator[str]:
    """Of weights that are not plain tensors, or of several dtypes; those of adapters don't count."""
    weights = [weight for layer in layers for weight in layer._parameters.values() if weight is not None]
    for kind in dict.fromkeys(type(weight) for weight in weights if type(weight) is not nn.Parameter):
        yield f"a weight is a {kind.__name__}"
    dtypes = dict.fromkeys(str(weight.dtype).removeprefix("torch.") for weight in weights)
    if len(dtypes) > 1:
        yield f"weights of a block are {' and '.join(dtypes)}"


def adapter_refusals(layer: Any) -> Iterator[str]:
    """Reasons why a fused block can't compute `layer` with its adapter as it is now."""
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        yield f"an adapter is {type(layer).__name__} on {type(layer.base_layer).__name__}, not LoRA on a linear layer"
        return
    if layer.merged:
        yield "an adapter is merged into its weights"
    if layer.disable_adapters:
        return
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        yield f"several adapters are active at once: {', '.join(active)}"
    for name in active:
        if name in layer.lora_variant:
            yield f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}, not plain LoRA"
        if layer.lora_bias[name] or layer.fan_in_fan_out:
            yield f"adapter {name!r} has a bias, or a transposed weight"
