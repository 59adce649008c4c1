"""What a network keeps in memory, counted from a run of the real architecture and not guessed.

Everything here works on real tensors as on fake ones (`torch._subclasses.FakeTensorMode`), which have sizes and no
memory: a model too large for this machine can be counted on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    """The most bytes alive at once that `call()` itself allocates, its results included. For calls without gradient."""
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
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in inputs:
                storage = tensor.untyped_storage()
                self._live[_key(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
