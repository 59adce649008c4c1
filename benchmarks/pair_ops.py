"""Cases of the pair ops: each one beside the plain float32 code that a user would write, eager and compiled.

The plain code is not the torch reference, which spends float64 on exactness: it takes its noise from `torch.randn`,
means in float32, and nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfo_engine import ops

SHAPE = (16, 64, 64)
SIZE = math.prod(SHAPE)
STEPS = 40
SEED = 7
SIGMA, SIGMA_NEXT, GAMMA = 0.75, 0.7, 0.0025


Call = Callable[[], Any]
Wrap = Callable[[Call], Call]


class Case(NamedTuple):
    """One comparison: plain code and `op(backend)`, and the bytes that the op has to move once.

    `check(backend)` is the op where it leaves its inputs alone: backends are compared before anything is timed.
    `plain(wrap)` gives the call, with its arithmetic wrapped: by nothing, or by torch.compile. `comparable` says that
    it computes the same numbers, and not with noise of its own. `offered`: the backends that the op has.
    """

    name: str
    plain: Callable[[Wrap], Call]
    op: Callable[[str], Any]
    check: Callable[[str], Tensor]
    num_bytes: int
    comparable: bool
    offered: tuple[str, ...] = ("torch", "cpp", "triton", "cuda")


def cases(device: torch.device, *, pairs: int, rows: int) -> list[Case]:
    """All cases: sampling ops on `pairs` pairs, the loss and the replay on `rows` items."""
    return [
        _normal(device, 2 * pairs),
        _noise(device, pairs),
        _step(device, pairs, guided=False),
        _step(device, pairs, guided=True),
        _replay(device, rows),
        _direction(device, pairs),
        _loss(device, rows, torch.float32),
        _loss(device, rows, torch.bfloat16),
    ]


def _normal(device: torch.device, count: int) -> Case:
    ids = torch.arange(count, device=device)

    def op(backend: str) -> Tensor:
        return ops.philox_normal(SHAPE, seed=SEED, pair_ids=ids, stream=0, device=device, backend=backend)

    return Case(
        f"philox_normal, {count} latents",
        lambda wrap: wrap(lambda: torch.randn(count, *SHAPE, device=device)),
        op,
        op,
        4 * count * SIZE,
        comparable=False,
    )


def _noise(device: torch.device, pairs: int) -> Case:
    ids = torch.arange(pairs, device=device)

    def plain() -> Tensor:
        n = torch.randn(pairs, 1, *SHAPE, device=device)
        eps = torch.randn(pairs, 2, *SHAPE, device=device)
        return (n + math.sqrt((1 + GAMMA) ** 2 - 1) * eps) / (1 + GAMMA)

    def op(backend: str) -> Tensor:
        return ops.paired_noise(ids, SHAPE, seed=SEED, gamma=GAMMA, device=device, backend=backend)

    return Case(
        f"paired_noise, {2 * pairs} latents",
        lambda wrap: wrap(plain),
        op,
        op,
        8 * pairs * SIZE,
        comparable=False,
    )


def _step(device: torch.device, pairs: int, *, guided: bool) -> Case:
    ids = torch.arange(pairs, device=device)
    x = torch.randn(pairs, 2, *SHAPE, device=device)
    v, uncond = (torch.randn(pairs, 2, *SHAPE, device=device).bfloat16() for _ in range(2))
    velocities = torch.empty(pairs, 2, 4, *SHAPE, dtype=torch.bfloat16, device=device)
    r = SIGMA_NEXT / (1 + GAMMA - GAMMA * SIGMA_NEXT)

    def plain() -> Tensor:
        used = v
        if guided:
            used = (uncond.float() + 4.5 * (v.float() - uncond.float())).bfloat16()
        velocities[:, :, 1].copy_(used)
        x.add_(used.float(), alpha=r - SIGMA)
        x.add_(torch.randn_like(x), alpha=r * math.sqrt((1 + GAMMA) ** 2 - 1))
        return x.div_(1 + GAMMA * r)

    start = x.clone()

    def op(backend: str, *, inplace: bool = True) -> Tensor:
        return ops.paired_step(
            x if inplace else start, v, sigma=SIGMA, sigma_next=SIGMA_NEXT, gamma=GAMMA, seed=SEED, pair_ids=ids,
            step=3, backend=backend,
            v_uncond=uncond if guided else None, guidance_scale=4.5, v_out=velocities[:, :, 1], inplace=inplace,
        )  # fmt: skip

    name = f"paired_step{', guided' if guided else ''}, {2 * pairs} latents"
    num_bytes = 2 * pairs * SIZE * (4 + 4 + 2 + 2 + 2 * guided)
    return Case(name, lambda wrap: wrap(plain), op, lambda b: op(b, inplace=False), num_bytes, comparable=False)


def _replay(device: torch.device, rows: int) -> Case:
    """A micro-batch of whole trajectories' items at random steps; the plain code has stored x and gathers it."""
    pairs = -(-rows // 4)
    velocities = torch.randn(pairs, 2, STEPS, *SHAPE, device=device).bfloat16()
    stored = torch.randn(pairs, 2, STEPS + 1, *SHAPE, device=device)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    item = torch.arange(rows)
    pair, branch = item // 4, item % 2
    step = torch.randint(0, STEPS, (rows,), generator=torch.Generator().manual_seed(0))
    index = pair.to(device), branch.to(device), step.to(device)
    last = torch.zeros(pairs, 2, dtype=torch.int64).index_put_((pair, branch), step)
    for p, b, s in zip(pair.tolist(), branch.tolist(), step.tolist(), strict=True):
        last[p, b] = max(int(last[p, b]), s)

    def op(backend: str) -> Tensor:
        return ops.replay(
            velocities, pair_ids=range(pairs), pair=pair, branch=branch, step=step, sigmas=sigmas, gammas=GAMMA,
            seed=SEED, backend=backend,
        )  # fmt: skip

    return Case(
        f"replay, {rows} items of {STEPS} steps",
        lambda wrap: wrap(lambda: stored[index]),
        op,
        op,
        SIZE * (2 * int(last.sum()) + 4 * rows),
        comparable=False,
    )


def _direction(device: torch.device, pairs: int) -> Case:
    x = torch.randn(pairs, 2, *SHAPE, device=device)

    def plain() -> Tensor:
        d = (x[:, 0] - x[:, 1]) / 2
        return d / (d.square().mean((1, 2, 3), keepdim=True) + 1e-6)

    def op(backend: str) -> Tensor:
        return ops.pair_direction(x, backend=backend)

    return Case(
        f"pair_direction, {pairs} pairs",
        lambda wrap: wrap(plain),
        op,
        op,
        pairs * SIZE * (8 + 4),
        comparable=True,
    )


def _loss(device: torch.device, rows: int, dtype: torch.dtype) -> Case:
    """Forward and backward."""
    v_old = torch.randn(rows, *SHAPE, device=device).to(dtype)
    v = (v_old.float() + 0.01 * torch.randn(rows, *SHAPE, device=device)).to(dtype).requires_grad_()
    u = torch.randn(-(-rows // 2), *SHAPE, device=device)
    A = torch.linspace(-1, 1, rows, device=device)
    pair, branch = torch.arange(rows) // 2, torch.arange(rows) % 2
    pair_, sign = pair.to(device), (1 - 2 * branch).to(device, torch.float32).view(-1, 1, 1, 1)

    def loss_of() -> Tensor:
        e = v.float() - v_old.float()
        log_ratio = -(e.square().mean((1, 2, 3)) + 2 * (e * (sign * u[pair_])).mean((1, 2, 3)))
        rho = log_ratio.exp()
        return (-A * rho + A.abs() / 0.06 * (rho - 1).square()).mean()

    def plain(wrap: Wrap) -> Call:
        wrapped = wrap(loss_of)
        return lambda: torch.autograd.grad(wrapped(), v)[0]

    def op(backend: str) -> Tensor:
        loss, _ = ops.fdfo_loss(v, v_old, u, A, clip_range=0.03, pair=pair, branch=branch, backend=backend)
        return torch.autograd.grad(loss, v)[0]

    bytes_v = v.element_size()
    name = f"fdfo_loss forward + backward, {str(dtype).removeprefix('torch.')}, {rows} items"
    return Case(name, plain, op, op, SIZE * (3 * bytes_v * rows + 4 * len(u)), comparable=True)
