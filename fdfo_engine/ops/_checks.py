"""What every op asks of its arguments. Each refusal names the argument, what it got and what it takes."""

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

Solver = Literal["churn", "antithetic", "sde"]
"""What a gamma of sampling is: METHOD's churn, the same with opposite noise in the two branches, or the noise level of
a stochastic differential equation."""

SOLVERS: tuple[Solver, ...] = get_args(Solver)
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LATENT_DTYPES = (torch.float32,)
REAL_DTYPES = (torch.float32, torch.float64)
MAX_STEPS = 2**28
MAX_LATENT = 2**34
MAX_STREAMS = 2
"""Kinds of tokens, such as image and text, that one call of a block's op takes."""

MAX_HEAD_SIZE = 256
"""Elements of one attention head. `kMaxHeadSize` of csrc."""

NORM_EPS = 1e-6
"""Of a norm where none is given; diffusers' blocks have it too."""


def refuse(op: str, name: str, got: object, takes: str) -> NoReturn:
    """Raises the ValueError of a wrong argument."""
    raise ValueError(f"{op}: {name} is {got}; it takes {takes}")


def tensor(
    op: str,
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    *,
    shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> None:
    """Refuses `value` unless it is a tensor of one of `dtypes`, with `shape`, on `device`, where they are given."""
    if not isinstance(value, Tensor):
        refuse(op, name, type(value).__name__, "a tensor")
    if value.dtype not in dtypes:
        refuse(op, name, value.dtype, " or ".join(map(str, dtypes)))
    if shape is not None and tuple(value.shape) != tuple(shape):
        refuse(op, name, list(value.shape), f"{list(shape)}")
    if device is not None and value.device != device:
        refuse(op, name, f"on {value.device}", f"tensors on one device, here {device}")


def paired(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype], *, extra: str = "") -> None:
    """Refuses `value` unless it is `[P, 2, {extra}*shape]`: the branch is a real axis."""
    tensor(op, name, value, dtypes)
    least = 4 if extra else 3
    if value.ndim < least or value.shape[1] != 2:
        refuse(op, name, list(value.shape), f"[P, 2, {extra}*shape], with the branch axis of size 2")
    if math.prod(value.shape[2:]) == 0:
        refuse(op, name, list(value.shape), "at least one element a latent")
    _latent_fits(op, name, value.shape[3 if extra else 2 :])


def written(op: str, name: str, value: Tensor) -> None:
    """Refuses `value` as an output if some of its elements share memory, as those of an expanded tensor do.

    Each place would hold one of the values written to it, and the tensor would not be what was computed.
    """
    reach = 0  # of the axes looked at so far: the distance from the first element to the last
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reach and value.numel() > 0:
            got = f"of shape {list(value.shape)} with strides {list(value.stride())}, so that elements share memory"
            refuse(op, name, got, "a tensor with memory for each element, such as a contiguous one")
        reach += max(0, size - 1) * stride


def tokens(op: str, name: str, value: Any) -> None:
    """Refuses `value` unless it is `[B, S, D]` of a model's dtype, with at least one element a token."""
    tensor(op, name, value, MODEL_DTYPES)
    if value.ndim != 3 or value.shape[2] == 0:
        refuse(op, name, list(value.shape), "[B, S, D], with at least one element a token")


def per_sample(op: str, name: str, value: Any, x: Tensor) -> None:
    """Refuses `value` unless it is `[B, D]` of the tokens `x`, of its dtype and on its device."""
    tensor(op, name, value, (x.dtype,), shape=(x.shape[0], x.shape[2]), device=x.device)


def head_size(op: str, value: Any) -> None:
    """Refuses `value` unless it is the size of an attention head that the kernels take."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_HEAD_SIZE:
        refuse(op, "head_size", repr(value), f"an int in 1..{MAX_HEAD_SIZE}")


def stream_count(op: str, streams: Sequence[Any]) -> None:
    """Refuses more streams of tokens than one call takes, or none."""
    if not 1 <= len(streams) <= MAX_STREAMS:
        refuse(op, "streams", f"of length {len(streams)}", f"one to {MAX_STREAMS} streams")


def latent_shape(op: str, shape: Any) -> tuple[int, ...]:
    """The shape of one latent as a tuple of at least one positive size."""
    sizes = tuple(operator.index(size) for size in shape)
    if not sizes or min(sizes) < 1:
        refuse(op, "shape", list(sizes), "one or more sizes of at least 1")
    _latent_fits(op, "shape", sizes)
    return sizes


def seed(op: str, value: Any) -> int:
    """The run's seed as a Python int."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        refuse(op, "seed", repr(value), "an int in 0..2^64-1")
    return value


def device(op: str, value: Any) -> torch.device:
    """`value` as a torch.device."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{op}: device is {value!r}; it takes a torch.device or its name") from error


def integers(op: str, name: str, value: Any, *, length: int | None, limit: int) -> Tensor:
    """`value`, a sequence of ints or an int64 tensor, as int64 `[length]`; each in 0..limit-1.

    A tensor on a GPU stays there, and its values are not looked at: that would wait for the GPU.
    """
    if isinstance(value, Tensor):
        tensor(op, name, value, (torch.int64,))
        if value.ndim != 1 or value.is_meta:
            refuse(op, name, f"{list(value.shape)} on {value.device}", "one axis, and values")
        out = value.detach()
        numbers = [] if out.is_cuda else out.tolist()
    else:
        numbers = _ints(op, name, value)
        out = None
    bad = [n for n in numbers if not 0 <= n < limit]
    if bad:
        refuse(op, name, f"{bad[0]} in one entry", f"integers in 0..{limit - 1}")
    out = torch.tensor(numbers, dtype=torch.int64) if out is None else out
    if length is not None and len(out) != length:
        refuse(op, name, f"of length {len(out)}", f"length {length}")
    return out


def pair_ids(op: str, value: Any, *, length: int | None = None) -> Tensor:
    """Global pair indices as int64 `[P]`."""
    return integers(op, "pair_ids", value, length=length, limit=2**63)


def churn(op: str, name: str, value: Any, shape: Sequence[int]) -> Tensor:
    """Churn weights as float64 of `shape`. Of a tensor on a GPU, which stays there, the values are not looked at."""
    if isinstance(value, Tensor) and value.ndim > 0:
        tensor(op, name, value, REAL_DTYPES, shape=shape)
        if value.is_meta:
            refuse(op, name, "on meta", "a tensor with values")
        gamma = value.detach().double()
    else:
        gamma = torch.full(tuple(shape), number(op, name, value), dtype=torch.float64)
    if not gamma.is_cuda and not bool(((gamma >= 0) & torch.isfinite(gamma)).all()):
        refuse(op, name, gamma.flatten().tolist()[:8], "finite numbers of at least 0")
    return gamma


def solver(op: str, value: Any) -> Solver:
    """The name of what gamma is."""
    if value not in SOLVERS:
        refuse(op, "solver", repr(value), " or ".join(SOLVERS))
    chosen: Solver = value
    return chosen


def moved(value: Tensor, target: torch.device) -> Tensor:
    """`value`, contiguous, on `target`. No host waits for a copy to a GPU; one from it has arrived."""
    to_gpu = target.type == "cuda"
    if to_gpu and value.device.type == "cpu":
        value = value.contiguous().pin_memory()  # the driver copies other memory itself, while the host stands still
    return value.to(target, non_blocking=to_gpu).contiguous()


def number(op: str, name: str, value: Any) -> float:
    """`value`, a Python number or a scalar tensor, as a float that is not NaN or infinite."""
    try:
        out = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{op}: {name} is {value!r}; it takes a number") from error
    if not math.isfinite(out):
        refuse(op, name, out, "a finite number")
    return out


def not_negative(op: str, name: str, value: Any) -> float:
    """`value` as a finite float of at least 0."""
    out = number(op, name, value)
    if out < 0:
        refuse(op, name, out, "a number of at least 0")
    return out


def descent(op: str, sigma: Any, sigma_next: Any) -> tuple[float, float]:
    """Both ends of a solver step, noise first."""
    start, end = number(op, "sigma", sigma), number(op, "sigma_next", sigma_next)
    if not 0 <= end <= 1 or not end < start:
        refuse(op, "sigma_next", f"{end} after sigma = {start}", "a value in 0..1 below sigma")
    return start, end


def grid(op: str, sigmas: Any, steps: int) -> list[float]:
    """The T + 1 points of the sampling grid, falling."""
    if isinstance(sigmas, Tensor):
        tensor(op, "sigmas", sigmas, REAL_DTYPES, shape=(steps + 1,))
        sigmas = sigmas.tolist()
    points = [number(op, "sigmas", sigma) for sigma in sigmas]
    if len(points) != steps + 1:
        refuse(op, "sigmas", f"of length {len(points)}", f"T + 1 = {steps + 1} numbers")
    if any(not 0 <= s <= 1 or not s < t for t, s in pairwise(points)):
        refuse(op, "sigmas", points, "falling numbers, in 0..1 from the second on")
    return points


def step(op: str, value: Any) -> int:
    """Index of a solver step; its streams must stay below those of generation."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_STEPS:
        refuse(op, "step", repr(value), f"an int in 0..{MAX_STEPS - 1}")
    return value


def _latent_fits(op: str, name: str, sizes: Sequence[int]) -> None:
    if math.prod(sizes) > MAX_LATENT:
        refuse(op, name, list(sizes), f"at most {MAX_LATENT} elements a latent: one Philox counter for every four")


def _ints(op: str, name: str, value: Any) -> list[int]:
    try:
        return [operator.index(item) for item in value]
    except TypeError as error:
        raise ValueError(f"{op}: {name} is {value!r}; it takes a sequence of ints or an int64 tensor") from error
