"""Small parts of `benchmarks.gpu_day`, each a process: `python -m benchmarks.gpu_parts versions`, or another one."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfo_engine import ops
from fdfo_engine.runtime.environment import describe_environment

SLACK = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest value: how far a backend may be from plain torch in a small case."""

PROFILED_STEPS, KERNELS_SHOWN = 3, 40


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("versions", "small_ops", "profile"))
    parser.add_argument("--arch", default="shapes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.part == "small_ops":
        small_ops(device)
        return
    found = versions() if arguments.part == "versions" else profile(arguments.arch, device)
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found))


def versions() -> dict[str, Any]:
    """Packages, devices and driver here, and why each backend can't run."""
    found = describe_environment()
    del found["host"]
    return found | {"backends": ops.backends(), "cudnn": torch.backends.cudnn.version()}


def small_ops(device: torch.device) -> None:
    """One small case an op and backend, forward and backward where there is one, against plain torch.

    Raises:
        AssertionError: a backend is too far off; names the op.
    """
    dtypes = (torch.float32, torch.bfloat16)
    cases = {f"{name}, {dtype}": (call, dtype) for dtype in dtypes for name, call in block_cases(device, dtype)}
    cases |= {name: (call, torch.float32) for name, call in pair_cases(device)}
    for name, (call, dtype) in cases.items():
        exact = call("torch")
        offered = ops.candidates(ops.implementations()[name.split(",")[0]], device)
        for backend in (one for one in offered if one != "torch"):
            found = call(backend)
            error = float((found.float() - exact.float()).abs().max())
            assert error <= SLACK[dtype] * float(exact.float().abs().max()), f"{name} on {backend}: {error} off"
            print(f"{name} on {backend}: {error:.1e} off", flush=True)


Call = Callable[[str], Tensor]


def block_cases(device: torch.device, dtype: torch.dtype) -> list[tuple[str, Call]]:
    """Ops of a transformer block, forward and backward, each with a call by the name of a backend."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grads: bool = False) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grads)

    x, y, gate, scale, shift = normal(2, 33, 64, grads=True), normal(2, 33, 64), *(normal(2, 64) for _ in range(3))
    w1, b1, w2 = 0.1 * normal(128, 64), normal(128), 0.1 * normal(64, 128)
    a, b = (0.1 * normal(*shape).float() for shape in ((8, 64), (64, 8)))
    projection = ops.Projection(0.1 * normal(64, 64), normal(64), ops.Adapter(a, b, 2.0))
    head = normal(32)

    def both(call: Callable[[str], Tensor]) -> Call:
        """The output and the gradient of x, side by side."""

        def run(backend: str) -> Tensor:
            out = call(backend)
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
            return torch.cat([out.detach().flatten(), grad.flatten()])

        return run

    def heads(backend: str) -> Tensor:
        q, _, _ = ops.qk_rms_norm([ops.QKV(x, y, y, head, head)], head_size=32, backend=backend)
        return q

    return [
        ("gated_residual", both(lambda backend: ops.gated_residual(x, y, gate, backend=backend))),
        ("layer_norm_modulate", both(lambda backend: ops.layer_norm_modulate(x, scale, shift, backend=backend))),
        ("qk_rms_norm", both(heads)),
        ("feed_forward", both(lambda backend: ops.feed_forward(x, w1, b1, w2, None, backend=backend))),
        ("adapted_projection", both(lambda backend: ops.adapted_projection(x, projection, backend=backend))),
    ]


def pair_cases(device: torch.device) -> list[tuple[str, Call]]:
    """Ops of pairs, each with a call by the name of a backend."""
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 2, 4, 5, 7, generator=generator).to(device) for _ in range(2))
    velocity = torch.randn(3, 4, 5, 7, generator=generator).to(device).requires_grad_()
    u, advantage = x[:, 0], torch.tensor([1.0, -1.0, 0.5], device=device)

    def step(backend: str) -> Tensor:
        return ops.paired_step(
            x, v, sigma=0.75, sigma_next=0.7, gamma=0.0025, seed=1, pair_ids=[3, 4], step=2, backend=backend
        )

    def loss(backend: str) -> Tensor:
        found, _ = ops.fdfo_loss(
            velocity, velocity.detach() + 0.01, u, advantage, clip_range=0.03, pair=torch.tensor([0, 0, 1]),
            branch=torch.tensor([0, 1, 0]), backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(found, velocity)[0]

    return [
        ("paired_step", step),
        ("fdfo_loss", loss),
        ("pair_direction", lambda backend: ops.pair_direction(x, backend=backend)),
    ]


def profile(name: str, device: torch.device) -> dict[str, Any]:
    """Kernels of a rollout step and a training step of the fused blocks, and the share of the time that they run."""
    from fdfo_engine.bench.architectures import architectures
    from fdfo_engine.bench.end_to_end import fused

    architecture = architectures()[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    candidate = fused("F", architecture, architecture.network(device, dtype), device, dtype)
    rollout, train = (architecture.rollout_batch, architecture.train_batch) if device.type == "cuda" else (1, 1)
    return {
        "rollout": profiled(candidate.rollout_step(rollout), device),
        "training": profiled(candidate.training_step(train), device),
    }


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """A step's seconds, launches, the share of them that the device works, and its kernels by time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    gpu = device.type == "cuda"
    step()
    started = _now(gpu)
    for _ in range(PROFILED_STEPS):
        step()
    seconds = (_now(gpu) - started) / PROFILED_STEPS
    with record(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        step()
        _now(gpu)
    events = trace.key_averages()
    taken = {event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6 for event in events}
    busy = sum(taken.values())
    top = sorted(events, key=lambda event: -taken[event.key])[:KERNELS_SHOWN]
    return {
        "seconds": seconds, "launches": sum(event.count for event in events), "busy_share": min(1.0, busy / seconds),
        "kernels": [{"name": event.key, "calls": event.count, "seconds": taken[event.key]} for event in top],
    }  # fmt: skip


def _now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
