"""Standard normal noise as a function of (seed, pair, stream, element)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _compiled, _dispatch
from fdfo_engine.ops.philox import MASK, SCALAR_STREAM, key_of, philox4x32

OFFERED = ("triton", "cuda", "cpp", "torch")
BLOCK = 1024  # counters a Triton program, 4 normals each; not tuned on a GPU yet
INTERPRETED_BLOCK = 16384  # the interpreter takes milliseconds a program, whatever its size


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int,
    pair_ids: Sequence[int] | Tensor,
    stream: int | Tensor,
    device: torch.device | str,
    backend: str | None = None,
) -> Tensor:
    """Noise of one stream for each pair: Philox words by Box-Muller, `sqrt(-2 ln ua) * (cos, sin)(2 pi ub)`.

    A value depends on (seed, pair, stream, flat element index) and on nothing else: not on the batch or its order.

    Args:
        shape: of one latent, at least one axis; any size.
        seed: the run's seed, int in 0..2^64-1.
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]` on any device.
        stream: int in 0..2^32-1 (names: `ops.philox`), or int64 `[P]` with one for each row.
        device: where the noise goes.
        backend: None takes the fastest that runs on `device`; a name of `ops.backends` forces one.

    Returns:
        float32 `[P, *shape]`, of variance 1, contiguous. Repeats bit for bit on one backend; backends agree to 4e-6
        absolute.

    Raises:
        ValueError: an argument is out of range or of the wrong shape or type.
        BackendUnavailableError: `backend` can't run on `device`.

    Source: METHOD, 'Noise is a function, not a state'.
    """
    op = "philox_normal"
    sizes, target = _checks.latent_shape(op, shape), _checks.device(op, device)
    pairs = _checks.pair_ids(op, pair_ids)
    one_a_row = stream if isinstance(stream, Tensor) else [stream] * max(len(pairs), 1)
    streams = _checks.integers(op, "stream", one_a_row, length=None, limit=2**32)[: None if len(pairs) else 0]
    if len(streams) != len(pairs):
        _checks.refuse(op, "stream", f"of length {len(streams)}", f"an int or one for each of {len(pairs)} pair_ids")
    key, count = key_of(_checks.seed(op, seed)), math.prod(sizes)
    run = _RUNS[_dispatch.choose(op, OFFERED, target, forced=backend)]
    return run(count, key, _checks.moved(pairs, target), _checks.moved(streams, target)).view(len(pairs), *sizes)


def pair_scalar_normal(pair_ids: Sequence[int] | Tensor, *, seed: int) -> Tensor:
    """The N(0, 1) behind each pair's churn schedule: element 0 of SCALAR_STREAM.

    Always the torch backend on the CPU, so that every rank and device derives the same churn from it.

    Args:
        pair_ids: P global pair indices in 0..2^63-1, a sequence of ints or an int64 `[P]` on any device.
        seed: the run's seed, int in 0..2^64-1.

    Returns:
        float32 values in a float64 `[P]` on the CPU, of variance 1 over pairs. Repeats bit for bit.

    Raises:
        ValueError: an argument is out of range or of the wrong shape or type.

    Source: METHOD, 'Noise is a function, not a state'.
    """
    noise = philox_normal((1,), seed=seed, pair_ids=pair_ids, stream=SCALAR_STREAM, device="cpu", backend="torch")
    return noise[:, 0].double()


def philox_normal_reference(count: int, key: tuple[int, int], pair_P: Tensor, stream_P: Tensor) -> Tensor:
    """The specification: `count` normals a pair, float32 `[P, count]`.

    In float64 up to the last rounding, so that differences between the maths libraries of devices, or between their
    vector and scalar loops, almost never reach the result.
    """
    index_J = torch.arange(-(-count // 4), device=pair_P.device)
    pair_P1, stream_P1 = pair_P[:, None], stream_P[:, None]
    words_PJ = philox4x32((index_J, stream_P1, pair_P1 & MASK, pair_P1 >> 32), key)
    u0, u1, u2, u3 = (((word >> 9).double() + 0.5) * 2.0**-23 for word in words_PJ)
    radius0, radius1 = (torch.sqrt(-2 * torch.log(u)) for u in (u0, u2))
    angle0, angle1 = 2 * math.pi * u1, 2 * math.pi * u3
    normals = (radius0 * angle0.cos(), radius0 * angle0.sin(), radius1 * angle1.cos(), radius1 * angle1.sin())
    return torch.stack([n.float() for n in normals], -1).flatten(1)[:, :count].contiguous()


def _philox_normal_compiled(count: int, key: tuple[int, int], pair_P: Tensor, stream_P: Tensor) -> Tensor:
    out = torch.empty(len(pair_P), count, dtype=torch.float32, device=pair_P.device)
    if out.numel():
        rows, size = out.shape
        arguments = _compiled.arguments(
            "PhiloxNormal", out=out.data_ptr(), pair=pair_P.data_ptr(), stream=stream_P.data_ptr(), rows=rows,
            size=size, seed=key,
        )  # fmt: skip
        _compiled.call("philox_normal", out.device, arguments)
    return out


def _philox_normal_triton(count: int, key: tuple[int, int], pair_P: Tensor, stream_P: Tensor) -> Tensor:
    from fdfo_engine.kernels.philox_normal import philox_normal_kernel  # triton: only where it runs

    out = torch.empty(len(pair_P), count, dtype=torch.float32, device=pair_P.device)
    if out.numel():
        block = BLOCK if out.is_cuda else INTERPRETED_BLOCK
        with torch.cuda.device_of(out):  # triton launches on the current device, not on the tensor's
            philox_normal_kernel[(len(pair_P) * -(-count // (4 * block)),)](
                pair_P, stream_P, out, count, *key, BLOCK=block, enable_fp_fusion=False
            )
    return out


_RUNS = {
    "torch": philox_normal_reference,
    "triton": _philox_normal_triton,
    "cpp": _philox_normal_compiled,
    "cuda": _philox_normal_compiled,
}
