"""Chooses the implementation of an op. Every refusal carries its reason."""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch

from fdfo_engine.ops import _compiled

BACKENDS = ("triton", "cuda", "cpp", "torch")  # most preferred first; Triton before CUDA until both are measured
LIBRARY = "triton_ends"
"""Triton's passes behind a library's products: offered by ops that multiply, never the first of the fixed order."""

OF_TRITON = ("triton", LIBRARY)

INTERPRETER = "TRITON_INTERPRET"
_CPU = torch.device("cpu")
MIN_CAPABILITY = (8, 0)  # the oldest GPU that the kernels are compiled for in the tests


class BackendUnavailableError(ValueError):
    """No backend, or not the forced one, can run an op here; the message holds every reason."""

    exit_code = 3


def backends(device: torch.device | None = None) -> dict[str, list[str]]:
    """Reasons why each backend can't take tensors on `device`, by name; empty where it can.

    Without a device: why it can't run on this machine, each on the device that it is for.
    """
    if device is not None:
        return {name: refusals(name, device) for name in reversed(BACKENDS)}
    accelerator = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: refusals(name, _CPU if name == "cpp" else accelerator) for name in reversed(BACKENDS)}


def backend_for(device: torch.device, forced: str | None = None) -> str:
    """The backend of all pair ops on `device`: one choice for a whole run, since replay repeats only its own sampling.

    Raises:
        BackendUnavailableError: the forced one can't run there; with every reason.
    """
    return choose("pair ops", BACKENDS, device, forced=forced)


def block_backend(device: torch.device) -> str:
    """The backend that the ops of a transformer block take on `device` where none is forced."""
    return choose("block ops", ("triton", "cpp", "torch"), device)


def candidates(offered: Sequence[str], device: torch.device) -> list[str]:
    """Those of `offered` that can run on `device`, the one that `choose` takes first."""
    first = choose("an op", offered, device)
    others = [b for b in offered if b != first and not (b in OF_TRITON and interpreted())]
    return [first, *(b for b in others if not refusals(b, device))]


def refusals(backend: str, device: torch.device) -> list[str]:
    """Reasons why `backend` can't take tensors on `device`; an empty list means it can."""
    if backend in ("cpp", "cuda"):
        return _compiled.refusals(backend, device) or _old_gpu(device)
    if backend in OF_TRITON:
        return _triton_refusals(device)
    reasons = []
    if device.type == "cuda" and not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    if device.type in ("mps", "meta"):
        reasons.append(f"float64 arithmetic is not available on {device.type}")
    return reasons


def choose(op: str, offered: Sequence[str], device: torch.device, *, forced: str | None = None) -> str:
    """The backend to run `op` on `device`, out of those it is `offered` in.

    None for `forced` takes the fastest that fits. The Triton interpreter, a test tool, is only ever used when forced.

    Raises:
        BackendUnavailableError: none fits, or the forced one does not; the message holds every reason.
    """
    if forced is not None and forced not in offered:
        known = forced in (*BACKENDS, LIBRARY)
        why = "this op has no such implementation" if known else f"no such backend; they are {sorted(BACKENDS)}"
        raise BackendUnavailableError(f"{op}: backend is {forced!r}: {why}; it takes None or one of {sorted(offered)}")
    if forced is None and device.type == "cpu" and "cpp" in offered and not _compiled.refusals("cpp", device):
        return "cpp"  # as below; but reading the environment takes a fifth of a small op's time
    notes = []
    for backend in _candidates(offered) if forced is None else [forced]:
        reasons = refusals(backend, device)
        if not reasons:
            return backend
        notes.append(f"{backend}: {', '.join(reasons)}")
    raise BackendUnavailableError(f"{op}: no backend can run on {device}: " + "; ".join(notes))


def _candidates(offered: Sequence[str]) -> list[str]:
    return [b for b in BACKENDS if b in offered and not (b == "triton" and interpreted())]


def _triton_refusals(device: torch.device) -> list[str]:
    reasons = []
    if not _has_triton():
        reasons.append("triton is not installed")
    if interpreted() and device.type in ("cpu", "cuda"):
        return reasons or list(_interpreter_refusals())
    if device.type != "cuda":
        reasons.append(f"it needs a tensor on a CUDA device, or {INTERPRETER}=1 in the environment; got {device}")
    elif not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    else:
        reasons += _old_gpu(device)
    return reasons


def _old_gpu(device: torch.device) -> list[str]:
    if device.type != "cuda" or capability(device) >= MIN_CAPABILITY:
        return []
    return [f"{device} has compute capability {capability(device)}, below 8.0"]


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, which torch looks up anew at each call: ops ask in each of theirs."""
    return _answer(torch.cuda.get_device_capability, device)


@functools.cache
def _answer(ask: Callable[[torch.device], tuple[int, int]], device: torch.device) -> tuple[int, int]:
    return ask(device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreter_refusals() -> tuple[str, ...]:
    """Before 3.7 it took an array of one element for an integer, which numpy refuses from 2.4 on."""
    triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return ()
    return (f"the interpreter of triton {triton} fails with numpy {numpy}: it takes triton 3.7, or numpy below 2.4",)


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, a test tool."""
    return os.environ.get(INTERPRETER) == "1"
