"""Puts fused forwards on a diffusers transformer, and takes them off again; weights stay in its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fdfo_engine.models.fused.attention import attention_backends
from fdfo_engine.models.fused.families import family_of
from fdfo_engine.models.fused.joint_attention import Settings
from fdfo_engine.models.fused.joint_weights import JointWeights
from fdfo_engine.models.fused.refusals import block_refusals, blocks_of, fusion_refusals, layer_refusals
from fdfo_engine.models.fused.switch import Notice, Switch
from fdfo_engine.models.fused.watch import Watch
from fdfo_engine.ops import BackendUnavailableError, Chooser

RECOMPUTE = ("none", "fc1", "block")
_PLAN = "_fused"


class _Plan:
    """What fusing put on a transformer: the family's forwards, a watch a block, and the switches that choose."""

    def __init__(self, transformer: Any, fused: Any, *, unknown: str, required: bool) -> None:
        self.transformer, self.fused = transformer, fused
        self.blocks: list[nn.Module] = [block.block for block in fused.blocks]
        notice = Notice(required=required)
        watches = [Watch(block, block_refusals) for block in self.blocks]
        self._watches = [*watches, Watch(transformer.norm_out, layer_refusals)]
        self.switches = [
            Switch(block.block, block.forward, watch.reasons, notice, unknown=[unknown])
            for block, watch in zip(fused.blocks, watches, strict=True)
        ]
        self.switches.append(Switch(transformer, fused.forward, self.reasons, notice))

    def reasons(self) -> list[str]:
        """Why the transformer as a whole can't run fused as it is now; its blocks may, one by one."""
        if blocks_of(self.transformer) != self.blocks:
            return ["its blocks are others than those that were fused"]
        found = list(dict.fromkeys(reason for watch in self._watches for reason in watch.reasons()))
        if found:
            self._let_go()
        return found

    def joints(self) -> Iterator[JointWeights]:
        """The buffers that its weights lie in."""
        for block in self.fused.blocks:
            yield from block.joints
        if self.fused.modulations.joint is not None:
            yield self.fused.modulations.joint

    def _let_go(self) -> None:
        """Frees buffers whose weights lie elsewhere by now: cast to float8, say, or offloaded."""
        for joint in self.joints():
            joint.holds()


def fuse(
    transformer: Any, *, attention: str = "auto", recompute: str = "none", rehome: bool = True, required: bool = False
) -> None:
    """Makes `transformer` and each of its blocks compute on the engine's ops, forward and backward.

    Signatures, parameters and state_dict stay as they were, and blocks are still called as modules. LoRA may be added,
    switched off or removed later. Before, load its weights, move it to its device and dtype, and freeze what is frozen:
    whether norms of queries and keys can be inverted is looked up once.

    What comes later and would be passed over, such as hooks on a block or inside it, a cache of diffusers, a second
    active adapter or another attention processor, is noticed at the next call. That goes to diffusers' own forward,
    block by block, and is said once; when it is gone, calls are fused again.

    Args:
        transformer: of a class in `families.FAMILIES`, with or without a LoRA of peft.
        attention: name of an attention backend (`attention_backends`).
        recompute: what the backward computes again instead of keeping it: none, fc1 (the wide half of every
            feed-forward) or block (everything inside a block).
        rehome: lets frozen weights that read the same input share one buffer, so that one product runs them. Not
            where something else manages their storage (ZeRO-3).
        required: makes a call that would go to diffusers' own forward a UsageError instead.

    Raises:
        ValueError: this transformer is not supported, with every reason; no such `recompute`.
        BackendUnavailableError: `attention` can't run on its device.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"fuse: recompute is {recompute!r}; it takes one of {', '.join(RECOMPUTE)}")
    if reasons := fusion_refusals(transformer):
        raise ValueError("fuse: " + "; ".join(reasons))
    family, parameter = family_of(transformer), transformer.proj_out.weight
    assert family is not None
    head_size = transformer.config.attention_head_dim
    known = attention_backends(parameter.device, parameter.dtype, head_size, masked=family.masks_text)
    if reasons := known.get(attention, [f"there are {', '.join(known)}"]):
        raise BackendUnavailableError(f"fuse: attention is {attention!r}: {', '.join(reasons)}")
    unfuse(transformer)
    fused = family.fused(transformer, Settings(attention, recompute == "fc1", rehome))
    plan = _Plan(transformer, fused, unknown=family.attention_arguments, required=required)
    for switch in plan.switches:
        switch.module.forward = switch
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
    for switch in plan.switches:
        switch.remove()
    for joint in plan.joints():
        joint.release()
    delattr(transformer, _PLAN)


@contextmanager
def own_forwards(transformer: Any) -> Iterator[None]:
    """Within this context a fused `transformer` computes as diffusers does; nothing where it is not fused."""
    switches = getattr(transformer, _PLAN).switches if is_fused(transformer) else []
    for switch in switches:
        switch.off = True
    try:
        yield
    finally:
        for switch in switches:
            switch.off = False


def ask_chooser(transformer: Any, chooser: Chooser | None) -> None:
    """Lets the ops of a fused `transformer` ask `chooser` for their backends; None leaves them to the fixed order."""
    for switch in getattr(transformer, _PLAN).switches:
        switch.chooser = chooser


def is_fused(transformer: Any) -> bool:
    """Whether `fuse` is in force."""
    return _PLAN in vars(transformer)


def fused_blocks(transformer: Any) -> list[nn.Module]:
    """The blocks that run fused: what shards weights (ZeRO-3) has to gather each of them whole."""
    return list(getattr(transformer, _PLAN).blocks) if is_fused(transformer) else []
