"""Which way, and how strongly, the two images of a pair differ: the finite difference of FDFO."""

import torch
from torch import Tensor

from fdfo_engine.ops import _checks, _dispatch

OFFERED = ("torch",)
FLOOR = 1e-6
"""Added to mean(d^2), in squared latent units."""


@torch.no_grad()
def pair_direction(x: Tensor, *, inplace: bool = False, backend: str | None = None) -> Tensor:
    """u of branch 0, `d / (mean(d^2) + 1e-6)` with `d = (x_0 - x_1) / 2`; branch 1 has -u. Equal branches give 0.

    Args:
        x: final latents, float32 `[P, 2, *shape]`; the mean is over one latent.
        inplace: write u over branch 0 of `x` and return that view, `x[:, 0]`.
        backend: None or "torch".

    Returns:
        float32 `[P, *shape]`, in units of 1 / latent. Not differentiable. Repeats bit for bit. A latent that is not
        finite gives a u that is not.

    Raises:
        ValueError: `x` is not float32 `[P, 2, *shape]`.
        BackendUnavailableError: `backend` can't run on `x`'s device.

    Source: METHOD, 'Update'.
    """
    op = "pair_direction"
    _checks.paired(op, "x", x, _checks.LATENT_DTYPES)
    _dispatch.choose(op, OFFERED, x.device, forced=backend)
    u = pair_direction_reference(x)
    return x[:, 0].copy_(u) if inplace else u


def pair_direction_reference(x: Tensor) -> Tensor:
    """The specification. The mean is summed in float64, so that its order can't show in the result."""
    d = (x[:, 0] - x[:, 1]) / 2
    mean_square = d.flatten(1).square().mean(1, dtype=torch.float64)
    return d / (mean_square + FLOOR).float().view(-1, *[1] * (d.ndim - 1))
