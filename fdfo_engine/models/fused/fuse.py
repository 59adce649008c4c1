"""Puts fused forwards on a diffusers transformer, and takes them off again; weights stay in its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from fdfo_engine.models.fused.attention import attention_backends
from fdfo_engine.models.fused.flux import FusedFlux
from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.refusals import fusion_refusals
from fdfo_engine.models.fused.sd3 import FusedSD3
from fdfo_engine.models.fused.streams import Settings
from fdfo_engine.ops import BackendUnavailableError

RECOMPUTE = ("none", "fc1", "block")
_FAMILIES: dict[type, Any] = {SD3Transformer2DModel: FusedSD3, FluxTransformer2DModel: FusedFlux}
_PLAN = "_fused"


def fuse(transformer: Any, *, attention: str = "auto", recompute: str = "none", rehome: bool = True) -> None:
    """Makes `transformer` and each of its blocks compute on the engine's ops, forward and backward.

    Signatures, parameters and state_dict stay as they were, and blocks are still called as modules, so that hooks on
    them run; hooks on modules inside a block do not. LoRA may be added, switched off or removed later. Before, load
    its weights, move it to its device and dtype, and freeze what is frozen: whether norms of queries and keys can be
    inverted is looked up once.

    Args:
        transformer: an SD3Transformer2DModel or FluxTransformer2DModel, with or without a LoRA of peft.
        attention: name of an attention backend (`attention_backends`).
        recompute: what the backward computes again instead of keeping it: none, fc1 (the wide half of every
            feed-forward) or block (everything inside a block).
        rehome: lets frozen weights that read the same input share one buffer, so that one product runs them. Not
            where something else manages their storage (ZeRO-3).

    Raises:
        ValueError: this transformer is not supported, with every reason; no such `recompute`.
        BackendUnavailableError: `attention` can't run on its device.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"fuse: recompute is {recompute!r}; it takes one of {', '.join(RECOMPUTE)}")
    if reasons := fusion_refusals(transformer):
        raise ValueError("fuse: " + "; ".join(reasons))
    parameter, head_size = transformer.proj_out.weight, transformer.config.attention_head_dim
    known = attention_backends(parameter.device, parameter.dtype, head_size)
    if reasons := known.get(attention, [f"there are {', '.join(known)}"]):
        raise BackendUnavailableError(f"fuse: attention is {attention!r}: {', '.join(reasons)}")
    unfuse(transformer)
    plan = _FAMILIES[type(transformer)](transformer, Settings(attention, recompute == "fc1", rehome))
    for block in plan.blocks:
        block.block.forward = block.forward
    transformer.forward = plan.forward
    setattr(transformer, _PLAN, plan)
    if recompute == "block":
        transformer.enable_gradient_checkpointing()


def unfuse(transformer: Any) -> None:
    """Gives `transformer` back its own forward, and each parameter storage of its own; nothing where it is not fused.

    Gradient checkpointing stays as it is.
    """
    if not is_fused(transformer):
        return
    plan = getattr(transformer, _PLAN)
    for block in plan.blocks:
        del block.block.forward
    for joint in _joints(plan):
        joint.release()
    del transformer.forward
    delattr(transformer, _PLAN)


@contextmanager
def own_forwards(transformer: Any) -> Iterator[None]:
    """Within this context a fused `transformer` computes as diffusers does; nothing where it is not fused."""
    parts = [transformer, *fused_blocks(transformer)] if is_fused(transformer) else []
    forwards = [part.forward for part in parts]
    for part in parts:
        del part.forward
    try:
        yield
    finally:
        for part, forward in zip(parts, forwards, strict=True):
            part.forward = forward


def is_fused(transformer: Any) -> bool:
    """Whether `fuse` is in force."""
    return _PLAN in vars(transformer)


def fused_blocks(transformer: Any) -> list[nn.Module]:
    """The blocks that run fused: what shards weights (ZeRO-3) has to gather each of them whole."""
    return [block.block for block in getattr(transformer, _PLAN).blocks] if is_fused(transformer) else []


def _joints(plan: Any) -> Iterator[JointWeights]:
    for block in plan.blocks:
        yield from block.joints
    if plan.modulations.joint is not None:
        yield plan.modulations.joint
