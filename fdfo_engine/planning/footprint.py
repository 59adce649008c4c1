"""What a network keeps in memory, counted from a run of the real architecture and not guessed.

Everything here works on real tensors as on fake ones (`torch._subclasses.FakeTensorMode`), which have sizes and no
memory: a model too large for this machine can be counted on it.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import Conditioning, FlowModel
from fdfo_engine.models.quantized import quantized_bytes
from fdfo_engine.models.registry import blank_model


class Line(NamedTuple):
    """Bytes that grow with a batch: `fixed + each * count`."""

    fixed: int
    each: int

    def at(self, count: int) -> int:
        """Bytes at `count`."""
        return self.fixed + self.each * count


@dataclass(frozen=True)
class Footprint:
    """Counted sizes of a model, in bytes but for `trained_values`.

    Attributes:
        frozen: the network's frozen weights. trained: its trained ones, in its own dtype.
        trained_values: their number. other: what else stays on the GPU, such as the VAE. text: the text encoders.
        forward: one call without gradient. training: forward and backward, gradients of the weights among the fixed.
        decode: images from latents. velocity: one sample at one step. image: one image, float32.
    """

    frozen: int
    trained: int
    trained_values: int
    other: int
    text: int
    forward: Line
    training: Line
    decode: Line
    velocity: int
    image: int


def footprint(model: FlowModel, conditioning: Conditioning, height: int, width: int) -> Footprint:
    """Counts `model` in runs of one and two samples; `conditioning` has one row.

    On a GPU the allocator tells, elsewhere every operator is followed. The network's gradients are dropped.
    """
    peak = _allocated if model.device.type == "cuda" else peak_bytes
    network, velocity = model.network, torch.empty((), dtype=model.dtype).element_size()

    def forward(count: int) -> Tensor:
        latents = torch.zeros(count, *model.latent_shape, device=model.device)
        rows = conditioning.rows(torch.zeros(count, dtype=torch.int64))
        return model.velocity(network, latents, torch.full((count,), 500.0), rows)

    def train(count: int) -> None:
        forward(count).float().sum().backward()
        network.zero_grad(set_to_none=True)

    def decode(count: int) -> Tensor:
        return model.decode(torch.zeros(count, *model.latent_shape, device=model.device))

    training = _line(lambda count: peak(lambda: train(count)))
    with torch.no_grad():
        forwarding = _line(lambda count: peak(lambda: forward(count)))
        decoding = _line(lambda count: peak(lambda: decode(count)))
    trained = [p for _, p in model.trained_parameters()]
    frozen = sum(p.nbytes for p in network.parameters()) - sum(p.nbytes for p in trained)
    return Footprint(
        frozen=frozen,
        trained=sum(p.nbytes for p in trained),
        trained_values=sum(p.numel() for p in trained),
        other=sum(p.nbytes for p in model.other_weights()),
        text=sum(p.nbytes for p in model.text_weights()),
        forward=forwarding,
        training=training,
        decode=decoding,
        velocity=math.prod(model.latent_shape) * velocity,
        image=3 * height * width * 4,
    )


def blank_footprint(config: Config) -> Footprint:
    """Sizes of `config.model` from its configs alone, counted on fake tensors.

    Raises:
        UsageError, EnvironmentProblem: as `blank_model`.
    """
    mode = FakeTensorMode()
    model, conditioning = blank_model(config, mode)
    with mode:
        found = footprint(model, conditioning, config.model.height, config.model.width)
    return _packed(found, model.network) if getattr(model, "packed_by", None) else found


def _packed(counted: Footprint, network: nn.Module) -> Footprint:
    """`counted` with the weights of the blocks in four bits, one of which is unpacked at a time."""
    saved, largest = quantized_bytes(network)
    lines = {name: getattr(counted, name) for name in ("forward", "training")}
    unpacked = {name: line._replace(fixed=line.fixed + largest) for name, line in lines.items()}
    return dataclasses.replace(counted, frozen=counted.frozen - saved, **unpacked)


def _line(peak: Callable[[int], int]) -> Line:
    one, two = peak(1), peak(2)
    each = max(two - one, 0)
    return Line(max(one - each, 0), each)


def _allocated(call: Callable[[], object]) -> int:
    call()  # workspaces and caches that stay are not the batch's
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    del result
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], Tensor], owned: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of `forward()` for its backward, each storage once, without those of `owned`."""
    weights = {_key(t) for t in owned}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # a storage that is freed meanwhile would lend its key to the next

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in weights:
            seen[_key(tensor)] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
        del out
    return sum(seen.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes alive at once that `call()` itself allocates, its results included."""
    with _LiveBytes() as live:
        result = call()
        del result
    peak: int = live.peak
    return peak


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator returns until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: int = 0
        self._live = 0
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in inputs and _key(tensor) not in self._watched:
                self._watch(tensor)
        self.peak = max(self.peak, self._live)
        return out

    def _watch(self, tensor: Tensor) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self._live -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)
        self._live += size


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
