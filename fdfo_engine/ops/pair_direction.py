"""Which way, and how strongly, the two images of a pair differ: the finite difference of FDFO."""

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _compiled, _dispatch

OFFERED = ("triton", "cuda", "cpp", "torch")
BLOCK = 4096  # elements a round of a Triton program; not tuned on a GPU yet
FLOOR = 1e-6
"""Added to mean(d^2), in squared latent units."""


@torch.no_grad()
def pair_direction(x: Tensor, *, inplace: bool = False, backend: str | None = None) -> Tensor:
    """u of branch 0, `d / (mean(d^2) + 1e-6)` with `d = (x_0 - x_1) / 2`; branch 1 has -u. Equal branches give 0.

    Args:
        x: final latents, float32 `[P, 2, *shape]`, in latent units; the mean is over one latent.
        inplace: write u over branch 0 of `x` and return that view, `x[:, 0]`.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        float32 `[P, *shape]`, in units of 1 / latent. Not differentiable. Repeats bit for bit. A latent that is not
        finite gives a u that is not.

    Raises:
        ValueError: `x` is not float32 `[P, 2, *shape]`, or its elements share memory and it is written in place.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: METHOD, 'Update'.
    """
    op = "pair_direction"
    _checks.paired(op, "x", x, _checks.LATENT_DTYPES)
    if inplace:
        _checks.written(op, "x", x)
    run = _RUNS[_dispatch.choose(op, OFFERED, x.device, forced=backend)]
    inner = _compiled.inner_contiguous(x, 2)
    out = inner[:, 0] if inplace else torch.empty(len(x), *x.shape[2:], device=x.device)
    if x.numel():
        run(inner, out)
    return x[:, 0].copy_(out) if inplace and inner is not x else out


def pair_direction_reference(x: Tensor, out: Tensor) -> None:
    """The specification. The mean is summed in float64, so that its order can't show in the result."""
    d = (x[:, 0] - x[:, 1]) / 2
    mean_square = d.flatten(1).square().mean(1, dtype=torch.float64)
    out.copy_(d / (mean_square + FLOOR).float().view(-1, *[1] * (d.ndim - 1)))


def _pair_direction_compiled(x: Tensor, out: Tensor) -> None:
    arguments = _compiled.arguments(
        "PairDirection", x=_compiled.strided(x), out=out.data_ptr(), out_stride=out.stride(0), pairs=len(x),
        size=_compiled.latent_size(x, 2), floor=FLOOR,
    )  # fmt: skip
    _compiled.call("pair_direction", x.device, arguments)


def _pair_direction_triton(x: Tensor, out: Tensor) -> None:
    from fdfo_engine.kernels.pair_direction import pair_direction_kernel  # triton: only where it runs

    strides = *x.stride()[:2], out.stride(0)
    with torch.cuda.device_of(x):  # triton launches on the current device, not on the tensor's
        pair_direction_kernel[(len(x),)](
            x, out, _compiled.latent_size(x, 2), *strides, FLOOR, BLOCK=BLOCK, enable_fp_fusion=False
        )


_RUNS = {
    "torch": pair_direction_reference,
    "triton": _pair_direction_triton,
    "cpp": _pair_direction_compiled,
    "cuda": _pair_direction_compiled,
}
