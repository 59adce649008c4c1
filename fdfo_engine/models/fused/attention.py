"""Which library runs the attention product: torch's own choice, or one that the user names. No kernel of ours."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fdfo_engine.ops import BackendUnavailableError, Shape, chosen

BACKENDS = ("auto", "sdpa", "cudnn", "flash", "flash3", "xformers")

CUDNN_EXACT = 91501
"""cuDNN before 9.15.1 returns wrong values for some sequences that are no multiple of 128."""

HALF = (torch.bfloat16, torch.float16)


MASKLESS = ("cudnn", "flash", "flash3", "xformers")
"""Backends that attend to every key."""


def _shape(q: Tensor, _k: Tensor, _v: Tensor, mask: Tensor | None = None) -> Shape:
    return (*q.shape[1:], *(() if mask is None else ("masked",)), q.dtype)


def _candidates(q: Tensor, _k: Tensor, _v: Tensor, mask: Tensor | None = None) -> list[str]:
    """auto first; sdpa is left out, which differs from it only where it would be wrong, and so is all else on a CPU."""
    if q.device.type == "cpu":
        return ["auto"]
    reasons = attention_backends(q.device, q.dtype, q.shape[-1], masked=mask is not None)
    return [name for name in BACKENDS if name != "sdpa" and not reasons[name]]


@chosen(_shape, _candidates, no_name=("auto", None))
def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", mask: Tensor | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(E)) v` of every head; differentiable in all three.

    Under `torch.use_deterministic_algorithms` only what repeats bit for bit is taken.

    Args:
        q, k, v: `[B, S, H, E]`, one dtype.
        backend: auto is torch's own choice, without a cuDNN that is known to be wrong at this length; sdpa is torch's
            own choice; cudnn and flash are those of torch; flash3 is the package flash_attn_interface; xformers is
            memory_efficient_attention.
        mask: bool `[B, S]`, whether a key is attended to; all are, without it.

    Returns:
        `[B, S, H, E]`, any strides.

    Raises:
        BackendUnavailableError: the named backend can't run here; with every reason.
    """
    repeats = torch.are_deterministic_algorithms_enabled()
    reasons = _refusals(backend, q.device, q.dtype, q.shape[-1], repeats, mask is not None)
    if reasons:
        raise BackendUnavailableError(f"attention: {backend} can't run on {q.device}: {', '.join(reasons)}")
    return _RUN[backend](q, k, v, mask)


def attention_backends(
    device: torch.device, dtype: torch.dtype, head_size: int, *, masked: bool = False
) -> dict[str, list[str]]:
    """Reasons why each backend can't run on `device`, with a mask if `masked`, by name; empty where it can."""
    repeats = torch.are_deterministic_algorithms_enabled()
    return {name: list(_refusals(name, device, dtype, head_size, repeats, masked)) for name in BACKENDS}


@functools.cache
def _refusals(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int, deterministic: bool, masked: bool
) -> tuple[str, ...]:
    if name not in BACKENDS:
        return (f"no such attention; there are {', '.join(BACKENDS)}",)
    if masked and name in MASKLESS:
        return ("it takes no mask, and prompts that are padded to one length have one",)
    if name in ("auto", "sdpa") or (name == "flash" and device.type == "cpu"):
        return ()
    if device.type != "cuda" or not torch.cuda.is_available():
        return ("it needs a CUDA device",)
    return tuple(_unfit_heads(name, dtype, head_size) + _unrepeated(name, deterministic) + _ABSENT[name](device))


def _unfit_heads(name: str, dtype: torch.dtype, head_size: int) -> list[str]:
    reasons = [] if dtype in HALF else [f"it takes bfloat16 and float16, not {dtype}"]
    limit = 128 if name == "cudnn" else 256
    if head_size % 8 or head_size > limit:
        reasons.append(f"heads are {head_size} wide; it takes multiples of 8 up to {limit}")
    return reasons


def _unrepeated(name: str, deterministic: bool) -> list[str]:
    if deterministic and name in ("cudnn", "xformers"):
        return ["its backward does not repeat bit for bit, which run.deterministic asks for"]
    return []


def _no_cudnn(device: torch.device) -> list[str]:
    version = torch.backends.cudnn.version() or 0
    if not torch.backends.cudnn.is_available():
        return ["torch is built without cuDNN"]
    if version < CUDNN_EXACT:
        return [f"cuDNN {version} is older than {CUDNN_EXACT} and wrong for some lengths"]
    return _older_than(device, 8)


def _no_flash(device: torch.device) -> list[str]:
    return _older_than(device, 8) if torch.backends.cuda.is_flash_attention_available() else ["not built into torch"]


def _no_flash3(device: torch.device) -> list[str]:
    if importlib.util.find_spec("flash_attn_interface") is None:
        return ["the package flash_attn_interface is not installed"]
    return _older_than(device, 9)


def _no_xformers(device: torch.device) -> list[str]:
    if importlib.util.find_spec("xformers") is None:
        return ["not installed: pip install 'fdfo-engine[xformers]'"]
    return _older_than(device, 8)


def _older_than(device: torch.device, major: int) -> list[str]:
    found = torch.cuda.get_device_capability(device)
    return [] if found[0] >= major else [f"{device} has compute capability {found}, below {major}.0"]


_ABSENT = {"cudnn": _no_cudnn, "flash": _no_flash, "flash3": _no_flash3, "xformers": _no_xformers}


def _torch_own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None]).transpose(1, 2)


def _auto(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if q.is_cuda and not _cudnn_is_right(k.shape[1]):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return _torch_own(q, k, v, mask)
    return _torch_own(q, k, v, mask)


def _cudnn_is_right(tokens: int) -> bool:
    if torch.are_deterministic_algorithms_enabled():
        return False
    return tokens % 128 == 0 or (torch.backends.cudnn.version() or 0) >= CUDNN_EXACT


def _only(kernel: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(kernel):
            return _torch_own(q, k, v, mask)

    return run


def _flash3(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
    interface: Any = importlib.import_module("flash_attn_interface")
    found = interface.flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
    operators: Any = importlib.import_module("xformers.ops")
    out: Tensor = operators.memory_efficient_attention(q, k, v)
    return out


_RUN = {
    "auto": _auto,
    "sdpa": _torch_own,
    "cudnn": _only(SDPBackend.CUDNN_ATTENTION),
    "flash": _only(SDPBackend.FLASH_ATTENTION),
    "flash3": _flash3,
    "xformers": _xformers,
}
