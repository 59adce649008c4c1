"""The clipped surrogate that pulls the velocity toward the better image of a pair."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfo_engine.ops import _checks, _compiled, _dispatch
from fdfo_engine.ops._records import blank, save, saved

OFFERED = ("triton", "cuda", "cpp", "torch")
BLOCK = 4096  # elements a Triton program; not tuned on a GPU yet
ROWS, MAX_PARTS = 16, 32  # tile in which the last program adds up partial sums


def fdfo_loss(
    v: Tensor,
    v_old: Tensor,
    u: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    pair: Sequence[int] | Tensor | None = None,
    branch: Sequence[int] | Tensor | None = None,
    normalizer: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`L = sum_b [-A*rho + |A| / (2c) * (rho - 1)^2] / normalizer`, `rho = exp(l)`, `l = -(mean(e^2) + 2*mean(e*u))`.

    `e = v - v_old`; means over one latent. l equals `mean(u^2) - mean((v - v*)^2)` with the target `v* = v_old - u`.
    Differentiable in `v` only: `dL/dv = (-A*rho + |A|/c * (rho-1)*rho) * (-2/n) * (e + u) / normalizer`, rounded to
    the dtype of `v`. A row with A = 0 gets exactly 0, whatever its rho. A far-off `v` has l -> -inf, rho = 0 and
    gradient 0, never NaN. Where rho^2 leaves float32 (l > 44, possible only where mean(u^2) is above that too), loss
    and gradient are not finite, and the step is for the caller to skip.

    Args:
        v: velocity of the policy, guided and rounded as in sampling, `[B, *shape]`, in latent units a unit of t,
            finite; float32, bfloat16 or float16.
        v_old: velocity of the rollout, as `v`; the dtype may differ.
        u: `pair_direction`, float32 `[P, *shape]`, in units of 1 / latent, taken for a velocity's.
        advantage: A, in units of the reward, signed for its branch, finite; float32 or float64 `[B]`.
        clip_range: c > 0, in units of rho.
        pair, branch: rows of `u`, and where to negate it (branch 1): sequences of ints or int64 `[B]` on any device.
            Without them B = 2P: both branches of every pair, in order.
        normalizer: replaces B: the items of the whole optimiser step; > 0.
        backend: None takes the fastest that runs on `v`'s device; a name of `ops.backends` forces one.

    Returns:
        The loss, float32 scalar, in units of A, and the log-ratio l of each row, float32 `[B]`, in nats, detached.
        Sums are in float64, in a fixed order: two calls agree bit for bit.

    Raises:
        ValueError: an argument is out of range or of the wrong shape, dtype or device; B = 0 without a normalizer;
            one of pair and branch without the other.
        BackendUnavailableError: `backend` can't run on `v`'s device.

    Source: METHOD, 'Update'.
    """
    op = "fdfo_loss"
    check_tensors(op, v, v_old, u)
    _checks.tensor(op, "advantage", advantage, _checks.REAL_DTYPES, shape=v.shape[:1], device=v.device)
    clip, total = _positive(op, "clip_range", clip_range), len(v) if normalizer is None else normalizer
    if normalizer is None and len(v) == 0:
        _checks.refuse(op, "normalizer", None, "a number above 0 where v has no rows")
    pair_B, branch_B = items_of(op, v, u, pair, branch)
    implementation = _dispatch.choose(op, OFFERED, v.device, forced=backend)
    total, A_B = _positive(op, "normalizer", total), advantage.detach()
    if implementation == "torch":
        return fdfo_loss_reference(v, v_old, u[pair_B], (1 - 2 * branch_B).double(), A_B.double(), clip, total)
    settings = _Settings(clip, total, implementation)
    found: tuple[Tensor, Tensor] = _FdfoLoss.apply(settings, A_B, *Batch(v, v_old, u, pair_B, branch_B))
    return found


def fdfo_loss_reference(
    v: Tensor, v_old: Tensor, u: Tensor, sign_B: Tensor, A_B: Tensor, clip_range: float, normalizer: float
) -> tuple[Tensor, Tensor]:
    """The specification; `u` is `[B, *shape]` of branch 0. Float64 inside: e^2 of any float32 stays finite."""
    e_BN = (v.double() - v_old.detach().double()).flatten(1)
    u_BN = sign_B[:, None] * u.detach().double().flatten(1)
    log_ratio = -(e_BN.square().mean(1) + 2 * (e_BN * u_BN).mean(1))
    rho = torch.where(A_B == 0, 0.0, log_ratio).exp()  # masked before exp: 0 * inf would be NaN in both directions
    surrogate = -A_B * rho + A_B.abs() / (2 * clip_range) * (rho - 1).square()
    return (surrogate.sum() / normalizer).float(), log_ratio.detach().float()


class Batch(NamedTuple):
    """Tensors of a kernel, latents contiguous: v, v_old `[B, *shape]`, u `[P, *shape]`, pair, branch `[B]`."""

    v: Tensor
    v_old: Tensor
    u: Tensor
    pair: Tensor
    branch: Tensor

    @property
    def size(self) -> int:
        """Elements of one latent."""
        return _compiled.latent_size(self.v, 1)

    def readable(self) -> Batch:
        """With latents contiguous: copied where they are not."""
        v, v_old, u = (_compiled.inner_contiguous(t, 1) for t in (self.v, self.v_old, self.u))
        return self._replace(v=v, v_old=v_old, u=u)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the rows of v, v_old and u."""
        return self.v.stride(0), self.v_old.stride(0), self.u.stride(0)


class Outputs(NamedTuple):
    """What a forward kernel writes. The backward needs `scale` float64 `[B]`: dL/dv = scale * (e + u)."""

    loss: Tensor
    log_ratio: Tensor
    scale: Tensor
    grad: Tensor | None
    """dL/dv, where it is cheapest to make at once: on the CPU, while a row is in the cache."""

    @classmethod
    def empty(cls, v: Tensor, *, with_grad: bool = False) -> Outputs:
        """Unwritten, for the rows of `v`; the loss of no rows is 0."""
        rows, device = len(v), v.device
        return cls(
            (torch.empty if rows else torch.zeros)((), dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float64, device=device),
            torch.empty(v.shape, dtype=v.dtype, device=device) if with_grad else None,
        )


class _Settings(NamedTuple):
    clip_range: float
    normalizer: float
    backend: str


class _Kept(NamedTuple):
    """What the backward reads: `scale` and `grad` are those of `Outputs`."""

    batch: Batch
    scale: Tensor
    grad: Tensor | None


class _FdfoLoss(torch.autograd.Function):
    """`fields`: those of a `Batch`, of which v takes a gradient."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, advantage: Tensor, *fields: Tensor) -> tuple[Tensor, Tensor]:
        batch = Batch(*fields).readable()
        needs_grad = ctx.needs_input_grad[2]  # of v, the first of the fields
        out = Outputs.empty(batch.v, with_grad=needs_grad and settings.backend == "cpp")
        if len(batch.v):
            FORWARD[settings.backend](batch, advantage.contiguous(), settings.clip_range, settings.normalizer, out)
        save(ctx, _Kept(batch, out.scale, out.grad))
        ctx.backend = settings.backend
        ctx.mark_non_differentiable(out.log_ratio)
        return out.loss, out.log_ratio

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _log_ratio: Tensor) -> tuple[Tensor | None, ...]:
        kept: _Kept = saved(ctx)
        grad = kept.grad
        if grad is None or upstream.item() != 1:
            v = kept.batch.v
            grad = torch.empty(v.shape, dtype=v.dtype, device=v.device)
            if len(v):
                BACKWARD[ctx.backend](kept.batch, kept.scale, upstream, grad)
        return None, None, *blank(kept.batch)._replace(v=grad)


def _arguments(batch: Batch) -> Any:
    v_row, v_old_row, u_row = batch.strides
    return _compiled.arguments(
        "FdfoLoss", v=batch.v.data_ptr(), v_old=batch.v_old.data_ptr(), number=_compiled.NUMBERS[batch.v.dtype],
        number_old=_compiled.NUMBERS[batch.v_old.dtype], v_stride=v_row, v_old_stride=v_old_row, u=batch.u.data_ptr(),
        u_stride=u_row, pair=batch.pair.data_ptr(), branch=batch.branch.data_ptr(), rows=len(batch.v), size=batch.size,
    )  # fmt: skip


def _forward_cpp(batch: Batch, advantage: Tensor, clip_range: float, normalizer: float, out: Outputs) -> None:
    advantage = advantage.double()
    _compiled.call(
        "fdfo_loss_forward", batch.v.device, _arguments(batch), advantage.data_ptr(), clip_range, normalizer,
        out.scale.data_ptr(), out.loss.data_ptr(), out.log_ratio.data_ptr(),
        0 if out.grad is None else out.grad.data_ptr(),
    )  # fmt: skip


def _forward_cuda(batch: Batch, advantage: Tensor, clip_range: float, normalizer: float, out: Outputs) -> None:
    partial = _partial_sums(batch, _compiled.extension().cuda.SUM_BLOCK)  # type: ignore[union-attr]
    _compiled.call(
        "fdfo_loss_forward", batch.v.device, _arguments(batch), advantage.data_ptr(), advantage.dtype == torch.float64,
        clip_range, normalizer, partial.data_ptr(), _ticket(batch.v).data_ptr(), out.scale.data_ptr(),
        out.loss.data_ptr(), out.log_ratio.data_ptr(),
    )  # fmt: skip


def _forward_triton(batch: Batch, advantage: Tensor, clip_range: float, normalizer: float, out: Outputs) -> None:
    from fdfo_engine.kernels.fdfo_loss import fdfo_loss_forward_kernel  # triton: only where it runs

    chunks, partial = -(-batch.size // BLOCK), _partial_sums(batch, BLOCK)
    parts = parts_of(chunks)
    with torch.cuda.device_of(batch.v):  # triton launches on the current device, not on the tensor's
        fdfo_loss_forward_kernel[(len(batch.v) * chunks,)](
            *batch, advantage, partial, _ticket(batch.v), out.scale, out.loss, out.log_ratio,
            len(batch.v), batch.size, chunks, *batch.strides, clip_range, normalizer,
            ROWS=ROWS, PARTS=parts, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


def _backward_cpp(batch: Batch, scale: Tensor, upstream: Tensor, grad: Tensor) -> None:
    scale = scale * upstream.double()
    _compiled.call("fdfo_loss_backward", grad.device, _arguments(batch), scale.data_ptr(), grad.data_ptr())


def _backward_cuda(batch: Batch, scale: Tensor, upstream: Tensor, grad: Tensor) -> None:
    addresses = scale.data_ptr(), upstream.data_ptr(), grad.data_ptr()
    _compiled.call("fdfo_loss_backward", grad.device, _arguments(batch), *addresses)


def _backward_triton(batch: Batch, scale: Tensor, upstream: Tensor, grad: Tensor) -> None:
    from fdfo_engine.kernels.fdfo_loss import fdfo_loss_backward_kernel  # triton: only where it runs

    with torch.cuda.device_of(grad):
        fdfo_loss_backward_kernel[(len(grad) * -(-batch.size // BLOCK),)](
            *batch, scale, upstream, grad, batch.size, *batch.strides, BLOCK=BLOCK, enable_fp_fusion=False
        )


FORWARD = {"cpp": _forward_cpp, "cuda": _forward_cuda, "triton": _forward_triton}
BACKWARD = {"cpp": _backward_cpp, "cuda": _backward_cuda, "triton": _backward_triton}


def parts_of(chunks: int) -> int:
    """Partial sums of a row that the last Triton program adds at once: a power of two that fits its registers."""
    return min(MAX_PARTS, 1 << (chunks - 1).bit_length())


def _partial_sums(batch: Batch, block: int) -> Tensor:
    count = 2 * len(batch.v) * -(-batch.size // block)
    return torch.empty(count, dtype=torch.float64, device=batch.v.device)


def _ticket(like: Tensor) -> Tensor:
    """The counter by which a kernel knows its last program; 0 between calls, so one for each stream is enough.

    The least recently used ones are let go. A kernel that still runs may hold one: its memory is only given out again
    to what comes later on the same stream.

    Not where a graph is captured: it may be replayed on any stream, so it gets a counter of its own.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    return _stream_ticket(like.device, torch.cuda.current_stream(like.device).cuda_stream)


@functools.lru_cache(maxsize=64)
def _stream_ticket(device: torch.device, _stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def check_tensors(op: str, v: Tensor, v_old: Tensor, u: Tensor) -> None:
    """Refuses velocities and directions that do not fit together."""
    _checks.tensor(op, "v", v, _checks.MODEL_DTYPES)
    if v.ndim < 2 or v.shape[1:].numel() == 0:
        _checks.refuse(op, "v", list(v.shape), "[B, *shape], with at least one element a latent")
    _checks.tensor(op, "v_old", v_old, _checks.MODEL_DTYPES, shape=v.shape, device=v.device)
    _checks.tensor(op, "u", u, _checks.LATENT_DTYPES, device=v.device)
    if u.shape[1:] != v.shape[1:]:
        _checks.refuse(op, "u", list(u.shape), f"[P, *shape] with the latent shape of v, {list(v.shape[1:])}")


def items_of(
    op: str, v: Tensor, u: Tensor, pair: Sequence[int] | Tensor | None, branch: Sequence[int] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row of `u` and branch of each row of `v`, int64 `[B]` on its device."""
    B, P = len(v), len(u)
    if (pair is None) != (branch is None):
        missing = "pair" if pair is None else "branch"
        _checks.refuse(op, missing, None, "indices where the other of pair and branch is given")
    if pair is not None:
        rows = _checks.integers(op, "pair", pair, length=B, limit=P)
        branches = _checks.integers(op, "branch", branch, length=B, limit=2)
    elif B == 2 * P:
        rows, branches = torch.arange(P).repeat_interleave(2), torch.arange(2).repeat(P)
    else:
        _checks.refuse(op, "pair", None, f"indices, unless v has 2P = {2 * P} rows; it has {B}")
    return _checks.moved(rows, v.device), _checks.moved(branches, v.device)


def _positive(op: str, name: str, value: float) -> float:
    out = _checks.number(op, name, value)
    if out <= 0:
        _checks.refuse(op, name, out, "a number above 0")
    return out
