"""The two linear layers of a transformer block with GELU between them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fdfo_engine.ops import _checks, _dispatch

OFFERED = ("torch",)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`gelu(x W1^T + b1) W2^T + b2`, GELU by tanh.

    Args:
        x: `[..., K]`; float32, bfloat16 or float16.
        w1, b1: `[H, K]` and `[H]`, dtype of `x`; the bias may be None.
        w2, b2: `[N, H]` and `[N]`, likewise.
        recompute: keeps `x` for the backward instead of the `[..., H]` between the layers, which is computed again.
        backend: None takes the fastest that runs on `x`'s device; a name of `ops.backends` forces one.

    Returns:
        `[..., N]`, dtype of `x`.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device.
        BackendUnavailableError: `backend` can't run on `x`'s device.
    """
    op = "feed_forward"
    _check_tensors(op, x, w1, b1, w2, b2)
    _dispatch.choose(op, OFFERED, x.device, forced=backend)
    if recompute:
        found: Tensor = checkpoint(feed_forward_reference, x, w1, b1, w2, b2, use_reentrant=False)
        return found
    return feed_forward_reference(x, w1, b1, w2, b2)


def feed_forward_reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """The specification; the hidden layer is rounded to the dtype of `x`, as a product takes it."""
    hidden = F.gelu(F.linear(x, w1, b1), approximate="tanh")
    return F.linear(hidden, w2, b2)


def _check_tensors(op: str, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    _checks.tensor(op, "x", x, _checks.MODEL_DTYPES)
    if x.ndim < 1 or x.shape[-1] == 0:
        _checks.refuse(op, "x", list(x.shape), "[..., K], K at least 1")
    for name, weight, inner in (("w1", w1, x.shape[-1]), ("w2", w2, len(w1))):
        _checks.tensor(op, name, weight, (x.dtype,), device=x.device)
        if weight.ndim != 2 or weight.shape[1] != inner or len(weight) == 0:
            _checks.refuse(op, name, list(weight.shape), f"[any, {inner}]")
    for name, bias, size in (("b1", b1, len(w1)), ("b2", b2, len(w2))):
        if bias is not None:
            _checks.tensor(op, name, bias, (x.dtype,), shape=(size,), device=x.device)
