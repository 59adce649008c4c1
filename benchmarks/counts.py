"""Launches, bytes and saved activations of the real SD3.5-Medium, counted on no device: `python -m benchmarks.counts`.

Nothing is computed. The model's graph runs on tensors without data, and every call that would launch a kernel on a GPU
is counted: aten calls by a dispatch mode, those of Triton by standing in for their launch. Plain is diffusers with
peft's LoRA under bfloat16 autocast, of whose casts the CPU's list is taken, which is shorter than that of a GPU; fused
is `fdfo_engine.models.fused` on backend triton. Attention is one call each way in both.

Bytes: each tensor that a launch reads or writes, once. Products of two large matrices, with what they read and write
beside it (an adapter, GELU's input), convolutions and attention are left out; products with LoRA's thin factors are
not, nor is a residual that a large product adds to. Saved: storages that the graph keeps for its backward, each once,
without parameters and buffers.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import RESULTS
from fdfo_engine.bench.architectures import CLIP_TOKENS, t5_tokens
from fdfo_engine.bench.record import header, write
from fdfo_engine.models.fused import fuse
from fdfo_engine.models.lora import ATTENTION_PROJECTIONS, add_lora

SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
LATENT = (16, 64, 64)
"""Of 512 x 512 pixels."""

TEXT = CLIP_TOKENS + t5_tokens("sd35m_pickscore")
RANK = 32
ROLLOUT_BATCH, TRAIN_BATCH = 12, 6
THIN = 64
"""A product is large where all its sizes are above this."""

LARGE_KERNELS = {"lora_linear_kernel", "lora_linear_input_kernel"}
FILLED = {"qk_rms_norm_forward_kernel", "qk_rms_norm_backward_kernel", "lora_linear_rank_gradient_kernel"}
"""Kernels that get a tensor which they have already in the place of one that they have no use for."""

_GEMMS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward"}
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh",
}  # fmt: skip


class Count(NamedTuple):
    """Of one pass: launches and bytes outside large products, by kernel, and bytes saved for the backward."""

    launches: Counter[str]
    bytes: Counter[str]
    saved_bytes: int = 0


class Recorder(TorchDispatchMode):
    """Counts what would be launched inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        found = tensors_of(out)
        if name not in _FREE and not func.is_view and any(tensor.numel() for tensor in found):
            self.add(name, tensors_of((args, kwargs)), found, large=is_large_product(name, args))
        return out

    def add(self, name: str, inputs: list[Tensor], outputs: list[Tensor], *, large: bool) -> None:
        """One launch."""
        self.launches[name] += 1
        if not large:
            self.bytes[name] += sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs))

    def launch(self, kernel: Any, _grid: Any) -> Any:
        """Stands in for `kernel[grid]` of Triton: an argument is read or written, whichever."""

        def record(*args: Any, **kwargs: Any) -> None:
            name, found = kernel.fn.__name__, tensors_of((args, kwargs))
            if name in FILLED:
                found = list({(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in found}.values())
            self.add(name, found, [], large=name in LARGE_KERNELS)
            if (
                "residuals" in kernel.arg_names
            ):  # of a large product these alone are counted: elsewhere a norm reads them
                self.bytes[name] += sum(map(bytes_of, tensors_of(args[kernel.arg_names.index("residuals")])))

        return record


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in it."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tensor: Tensor) -> int:
    """Of its distinct elements: an expanded axis is read once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def is_large_product(name: str, args: Any) -> bool:
    """Whether it is attention, or a product whose three sizes are all large."""
    if name.startswith("_scaled_dot_product"):
        return True
    if name not in _GEMMS:
        return False
    left, right = tensors_of(args)[-2:]
    return name.startswith("conv") or min(*left.shape[-2:], right.shape[-1]) > THIN


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: None = None, **_: Any) -> Tensor:
    """One call each way, as on a GPU; without data torch would take the formula apart."""
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return found


def model() -> nn.Module:
    """bfloat16 with a float32 LoRA, on the meta device."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network = SD3Transformer2DModel(**SD35_MEDIUM).bfloat16().requires_grad_(False).eval()
    add_lora(network, rank=RANK, alpha=64.0, targets=ATTENTION_PROJECTIONS, seed=0)
    return network


def inputs(batch: int) -> dict[str, Tensor]:
    """Keyword arguments of a forward."""
    bf16 = torch.bfloat16
    return {
        "hidden_states": torch.empty(batch, *LATENT, dtype=bf16), "timestep": torch.empty(batch),
        "encoder_hidden_states": torch.empty(batch, TEXT, SD35_MEDIUM["joint_attention_dim"], dtype=bf16),
        "pooled_projections": torch.empty(batch, SD35_MEDIUM["pooled_projection_dim"], dtype=bf16),
    }  # fmt: skip


def passes(network: nn.Module) -> dict[str, Count]:
    """A rollout's forward, and forward and backward of a training step."""
    with torch.no_grad():
        rollout, _, _ = forward(network, ROLLOUT_BATCH)
    train, saved, out = forward(network, TRAIN_BATCH)
    upstream = torch.empty_like(out)
    with recording() as backward:
        out.backward(upstream)
    return {
        "rollout": Count(rollout.launches, rollout.bytes),
        "forward": Count(train.launches, train.bytes, saved),
        "backward": Count(backward.launches, backward.bytes),
    }


def forward(network: nn.Module, batch: int) -> tuple[Recorder, int, Tensor]:
    """The record, bytes saved, and output of one."""
    given, own = inputs(batch), {t.untyped_storage()._cdata for t in [*network.parameters(), *network.buffers()]}
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with recording() as record, saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(**given, return_dict=False)[0]
    return record, sum(storage.nbytes() for storage in saved.values()), out


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Inside, calls are recorded, and Triton's kernels not launched."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    record = Recorder()

    def launch(kernel: Any, grid: Any) -> Any:
        return record.launch(kernel, grid)

    with contextlib.ExitStack() as patches:
        for family in (JITFunction, InterpretedFunction):
            patches.enter_context(mock.patch.object(family, "__getitem__", launch, create=True))
        patches.enter_context(mock.patch("fdfo_engine.ops._dispatch.choose", return_value="triton"))
        for place in ("torch.nn.functional", "fdfo_engine.models.fused.attention"):
            patches.enter_context(mock.patch(f"{place}.scaled_dot_product_attention", plain_attention))
        yield patches.enter_context(record)


def plain() -> dict[str, Count]:
    """Counts of diffusers and peft."""
    network = model()
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        stand_in(network)
        return passes(network)


@torch.no_grad()
def stand_in(network: nn.Module) -> None:
    """Gives `network` parameters that pretend to be on the CPU: autocast knows no tensors of the meta device."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad
                )
        for name, b in module._buffers.items():
            module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def fused() -> dict[str, Count]:
    """Counts of the fused blocks; the weights of their norms, which have no data here, taken as invertible."""
    network = model()
    with mock.patch("fdfo_engine.models.fused.joint_attention.is_invertible", return_value=True):
        fuse(network)
    with torch.device("meta"):
        return passes(network)


def main() -> None:
    """Prints both and writes `benchmarks/results/counts.json`."""
    found = {"plain": plain(), "fused": fused()}
    rows = [
        {
            "candidate": name, "pass": which, "launches": count.launches.total(), "other_bytes": count.bytes.total(),
            "saved_bytes_a_sample": count.saved_bytes // TRAIN_BATCH, "by_kernel": dict(count.launches.most_common()),
        }
        for name, counts in found.items()
        for which, count in counts.items()
    ]  # fmt: skip
    write(RESULTS / "counts.json", header("python -m benchmarks.counts", sys.argv[1:]) | {"rows": rows})
    print(f"{'':18}{'launches':>10}{'other GB':>10}{'saved GB a sample':>20}")
    for name, counts in found.items():
        for which, count in counts.items():
            saved = f"{count.saved_bytes / TRAIN_BATCH / 1e9:.2f}" if count.saved_bytes else ""
            print(f"{name:7}{which:11}{count.launches.total():>10}{count.bytes.total() / 1e9:>10.1f}{saved:>20}")
    for which, count in found["fused"].items():
        print(f"\nfused {which}")
        for kernel, launches in count.launches.most_common():
            print(f"{launches:6} {kernel:44}{count.bytes[kernel] / 1e9:6.2f} GB")


if __name__ == "__main__":
    main()
