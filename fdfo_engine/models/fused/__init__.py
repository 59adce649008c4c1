"""diffusers' transformers on the engine's fused ops: `fuse` and `unfuse`."""

from fdfo_engine.models.fused.attention import attention, attention_backends
from fdfo_engine.models.fused.fuse import ask_chooser, fuse, fused_blocks, is_fused, unfuse
from fdfo_engine.models.fused.refusals import fusion_refusals

__all__ = [
    "ask_chooser", "attention", "attention_backends", "fuse", "fused_blocks", "fusion_refusals", "is_fused", "unfuse",
]  # fmt: skip
