"""Each op that a run takes, once, against plain torch: a kernel that is wrong here is found before it trains.

Inputs are small, and are those of the run otherwise: its shapes, its dtype, the very layers of its network. Tolerances
are wide: rounding passes, a wrong index or a broken compiler does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.models.flow_model import FlowModel
from fdfo_engine.models.fused import ask_chooser, is_fused
from fdfo_engine.models.pipeline_model import PipelineModel
from fdfo_engine.ops import (
    Call,
    Chooser,
    Projected,
    fdfo_loss,
    gated_residual_norms,
    log_ratio,
    pair_direction,
    paired_noise,
    paired_step,
    under,
)
from fdfo_engine.planning.measuring import blank_velocity, tensors_of
from fdfo_engine.runtime.environment import package_version
from fdfo_engine.runtime.errors import NumericsError

REFERENCE = "torch"
MAX_ERROR = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest norm of the difference, in units of the reference's norm."""

_LEAST_SCALE = 1e-3
"""A result whose root mean square is below it is compared to this instead: of almost nothing, rounding is much."""

_PAIRS = 2


class Check:
    """A `Chooser` that holds every op, once a shape, against plain torch on the tensors of the call."""

    def __init__(self, choices: Chooser | None) -> None:
        """`choices` is what the run goes by; without it, and where it does not know, the fixed order."""
        self._choices = choices
        self._seen: set[str] = set()

    def backend(self, call: Call) -> str | None:
        """See `Chooser.backend`.

        Raises:
            NumericsError: the backend gives something else than torch.
        """
        wanted = None if self._choices is None else self._choices.backend(call)
        candidates = call.candidates()
        taken = wanted or candidates[0]
        if call.name not in self._seen and taken != REFERENCE and REFERENCE in candidates:
            self._seen.add(call.name)
            with torch.no_grad():
                found, expected = (under(None, _results, call, backend) for backend in (taken, REFERENCE))
                compare(call.name, taken, found, expected)
        return wanted


def check_ops(model: FlowModel, choices: Chooser | None, pair_ops: str) -> None:
    """Runs every op that `model` calls in a forward, and the pair ops on the backend `pair_ops`, beside plain torch.

    Raises:
        NumericsError: one gives something else; says by how much, at what shape and dtype, and the versions.
    """
    if pair_ops != REFERENCE:
        _check_pair_ops(model.latent_shape, model.dtype, model.device, pair_ops)
    if is_fused(model.network) and isinstance(model, PipelineModel):
        ask_chooser(model.network, Check(choices))
        try:
            with torch.no_grad():
                latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
                blank_velocity(model, latents.to(model.device))
        finally:
            ask_chooser(model.network, choices)


def compare(name: str, backend: str, found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Holds results against the reference's. Where that is not finite, weights are not: the rollout names them.

    Raises:
        NumericsError: they differ.
    """
    for result, reference in zip(found, expected, strict=True):
        if not bool(torch.isfinite(reference).all()):
            continue
        error, scale = _norm(result.double() - reference.double()), max(_norm(reference), _LEAST_SCALE)
        if not error <= MAX_ERROR.get(reference.dtype, MAX_ERROR[torch.float32]) * scale:  # NaN does not pass either
            raise NumericsError(_told(name, backend, result, reference))


def _told(name: str, backend: str, result: Tensor, reference: Tensor) -> str:
    worst = float((result.double() - reference.double()).abs().max())
    versions = ", ".join(f"{package} {package_version(package)}" for package in ("fdfo-engine", "torch", "triton"))
    device = torch.cuda.get_device_name(result.device) if result.device.type == "cuda" else "this processor"
    return (
        f"{name}: the backend {backend} gives something else than plain torch on {device}: max error {worst:.3g}, "
        f"at shape {list(result.shape)}, {result.dtype} ({versions})\n"
        f"another one: kernels.backend: {REFERENCE} for the pair ops, model.fused: false for those of a transformer"
    )


def _norm(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def _results(call: Call, backend: str) -> list[Tensor]:
    made = call.run(*call.arguments, **call.settings, backend=backend)
    return [tensor.clone() for tensor in tensors_of(_summed(made)) if tensor.is_floating_point()]


def _summed(made: Any) -> Any:
    """What a call returned; a sum that one backend leaves to the next norm, and another makes, is made by a norm."""
    if not isinstance(made, Projected):
        return made
    zeros = [torch.zeros_like(residual.x[:, 0]) for residual in made.residuals]
    normed = [gated_residual_norms([r.to_norm(zero, zero)]) for r, zero in zip(made.residuals, zeros, strict=True)]
    return made.streams, made.packed, normed


def _check_pair_ops(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, backend: str) -> None:
    generator, sizes = torch.Generator().manual_seed(0), (_PAIRS, 2, *shape)
    x, v_old, u = (torch.randn(sizes, generator=generator).to(device) for _ in range(3))
    v_old, v = v_old.to(dtype), (v_old + 0.1 * torch.randn(sizes, generator=generator).to(device)).to(dtype)
    rows = (v.flatten(0, 1), v_old.flatten(0, 1), u[:, 0])
    step = partial(
        paired_step, x, v_old, sigma=0.75, sigma_next=0.7, gamma=0.0025, seed=1, pair_ids=range(_PAIRS), step=3
    )
    noise = partial(paired_noise, range(_PAIRS), shape, seed=1, gamma=0.01, device=device)
    ops: dict[str, Callable[..., Any]] = {
        "paired_noise": noise, "paired_step": step, "pair_direction": partial(pair_direction, x),
        "log_ratio": partial(log_ratio, *rows),
        "fdfo_loss": partial(_loss, *rows),
    }  # fmt: skip
    for name, op in ops.items():
        found, expected = ([t.detach() for t in tensors_of(op(backend=b))] for b in (backend, REFERENCE))
        compare(name, backend, found, expected)


def _loss(v: Tensor, v_old: Tensor, u: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    """Loss and its gradient."""
    with torch.enable_grad():
        leaf = v.detach().requires_grad_()
        advantage = torch.linspace(-1.0, 1.0, len(v), device=v.device)
        loss, _ = fdfo_loss(leaf, v_old, u, advantage, clip_range=0.03, backend=backend)
        return loss, torch.autograd.grad(loss, leaf)[0]
