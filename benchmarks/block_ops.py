"""Cases of a transformer block's ops, forward and forward + backward, beside what diffusers' blocks do in plain torch.

Modulations take no gradient, as in LoRA training, and are views of one wide row, as adaLN makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from benchmarks.pair_ops import Call, Case, Wrap
from fdfo_engine import ops

EPS = 1e-6
WIDTH, TOKENS = 1536, 1024  # of SD3.5-Medium at 512 px
SMALL = (24, 76, 96)  # the bundled shapes model

Arithmetic = Callable[..., Tensor | tuple[Tensor, ...]]


def cases(device: torch.device, *, samples: int) -> list[Case]:
    """All cases: SD3.5-Medium's width on `samples` samples in two dtypes, and the shapes model's block."""
    sizes = [((samples, TOKENS, WIDTH), torch.float32), ((samples, TOKENS, WIDTH), torch.bfloat16)]
    return [
        case
        for shape, dtype in [*sizes, (SMALL, torch.float32)]
        for backward in (False, True)
        for case in _norms(device, shape, dtype, backward)
    ]


def _norms(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, backward: bool) -> list[Case]:
    B, _, D = shape
    x, y = (torch.randn(shape, device=device).to(dtype).requires_grad_(backward) for _ in range(2))
    shift, scale, gate, shift2, scale2, _ = torch.randn(B, 6 * D, device=device).to(dtype).chunk(6, dim=1)

    def plain_norm(x: Tensor) -> Tensor:
        return layer_norm(x, (D,), eps=EPS) * (1 + scale[:, None]) + shift[:, None]

    def plain_norms(x: Tensor) -> tuple[Tensor, Tensor]:
        normed = layer_norm(x, (D,), eps=EPS)
        return normed * (1 + scale[:, None]) + shift[:, None], normed * (1 + scale2[:, None]) + shift2[:, None]

    def plain_residual(x: Tensor, y: Tensor) -> Tensor:
        return x + gate.unsqueeze(1) * y

    def plain_both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_new = plain_residual(x, y)
        return x_new, plain_norm(x_new)

    def norm(backend: str) -> Arithmetic:
        return lambda x: ops.layer_norm_modulate(x, scale, shift, backend=backend)

    def norms(backend: str) -> Arithmetic:
        return lambda x: ops.layer_norm_modulate(x, scale, shift, scale2=scale2, shift2=shift2, backend=backend)

    def residual(backend: str) -> Arithmetic:
        return lambda x, y: ops.gated_residual(x, y, gate, backend=backend)

    def both(backend: str) -> Arithmetic:
        return lambda x, y: ops.gated_residual_norm(x, y, gate, scale, shift, backend=backend)

    # tensors of x's size that have to move: forward, and with the backward
    return [
        _case("layer_norm_modulate", plain_norm, norm, [x], (2, 5)),
        _case("layer_norm_modulate, two", plain_norms, norms, [x], (3, 7)),
        _case("gated_residual", plain_residual, residual, [x, y], (3, 5)),
        _case("gated_residual_norm", plain_both, both, [x, y], (4, 9)),
    ]


def _case(
    name: str, plain: Arithmetic, op: Callable[[str], Arithmetic], inputs: Sequence[Tensor], moved: tuple[int, int]
) -> Case:
    x, backward = inputs[0], inputs[0].requires_grad
    upstreams = [torch.randn_like(x) for _ in range(2)]

    def outputs(arithmetic: Arithmetic) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            found = arithmetic(*inputs)
        return found if isinstance(found, tuple) else (found,)

    def results(arithmetic: Arithmetic) -> tuple[Tensor, ...]:
        found = outputs(arithmetic)
        return torch.autograd.grad(found, inputs, upstreams[: len(found)]) if backward else found

    def last(arithmetic: Arithmetic) -> Tensor:
        """Of the last input, where all of a backward comes together, or the last output."""
        return results(arithmetic)[-1]

    def wrapped(wrap: Wrap) -> Call:
        arithmetic = wrap(plain)
        return lambda: last(arithmetic)

    passes = "forward + backward" if backward else "forward"
    label = f"{name} {passes}, {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    run = {backend: op(backend) for backend in ("triton", "cpp", "torch")}
    return Case(
        label, wrapped, lambda b: last(run[b]), lambda b: last(run[b]).detach(),
        moved[backward] * x.numel() * x.element_size(), comparable=True, offered=tuple(run),
    )  # fmt: skip
