"""Every CUDA kernel runs on CPU tensors, compiled as C++, and gives what the C++ backend gives; planted faults show.

What the fibres can't tell: races within a warp, memory order between thread blocks, alignment, and speed.
"""

import signal
import subprocess
import sys

import pytest
import torch
from offgpu.emulated_cuda import CONTRACTED, ROOT, as_backend_cuda, built

from fdfo_engine import ops

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHAPES = [(1,), (4, 8, 8), (3, 5, 7), (2, 33, 63)]
"""One element; rounds of four; an odd size; past a thread block and past a partial sum."""


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def philox(shape, backend):
    ids = [0, 5, 2**40]
    return ops.philox_normal(shape, seed=9, pair_ids=ids, stream=3, device="cpu", backend=backend)


def noise(shape, backend):
    return ops.paired_noise(torch.tensor([2, 7]), shape, seed=4, gamma=0.3, device="cpu", backend=backend)


def step(shape, backend):
    x = normal(2, 2, *shape)
    found = [
        ops.paired_step(
            x, normal(2, 2, *shape, seed=1, dtype=dtype), sigma=0.75, sigma_next=0.7, gamma=gamma, seed=3,
            pair_ids=[1, 6], step=2, backend=backend, guidance_scale=3.5,
            v_uncond=normal(2, 2, *shape, seed=2, dtype=dtype) if guided else None,
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16) for gamma in (0.0, 0.1) for guided in (False, True)
    ]  # fmt: skip
    return torch.stack(found)


def replay(shape, backend):
    velocities = normal(2, 2, 4, *shape, dtype=torch.bfloat16)
    return ops.replay(
        velocities, pair_ids=[3, 8], pair=torch.tensor([0, 1, 1]), branch=torch.tensor([1, 0, 1]),
        step=torch.tensor([0, 2, 3]), sigmas=torch.linspace(1, 0, 5), gammas=0.2, seed=5, backend=backend,
    )  # fmt: skip


def direction(shape, backend):
    return ops.pair_direction(normal(3, 2, *shape), backend=backend)


def loss(shape, backend):
    rows = 5
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        v_old = normal(rows, *shape, dtype=dtype)
        v = (v_old.float() + 0.05 * normal(rows, *shape, seed=1)).to(dtype).requires_grad_()
        value, log_ratio = ops.fdfo_loss(
            v, v_old, normal(3, *shape, seed=2), torch.linspace(-1, 1, rows), clip_range=0.03,
            pair=torch.tensor([0, 0, 1, 1, 2]), branch=torch.tensor([0, 1, 0, 1, 0]), backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(value, v)
        found.append(torch.cat([value.detach()[None], log_ratio.flatten(), grad.float().flatten()]))
    return torch.stack(found)


EXACT = (philox, noise, step, replay)
"""To the bit as in C++: the arithmetic of a latent's element stands once for both."""

SUMMED = (direction, loss)
"""Sums of another order: to float32's rounding."""


@pytest.fixture(scope="module")
def plain():
    return built()


def on_cuda(module, monkeypatch, order, run, shape):
    with as_backend_cuda(module, monkeypatch, order):
        return run(shape, "cuda")


def agrees(run, found, want):
    if run in EXACT:
        return found.equal(want)
    return torch.allclose(found, want, rtol=2e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", [*EXACT, *SUMMED])
def test_a_kernel_gives_what_the_cpp_backend_gives(run, shape, order, plain, monkeypatch):
    assert agrees(run, on_cuda(plain, monkeypatch, order, run, shape), run(shape, "cpp"))


@pytest.mark.parametrize("run", [*EXACT, *SUMMED])
def test_the_order_of_threads_and_blocks_changes_no_bit(run, plain, monkeypatch):
    shape = SHAPES[-1]
    one, other = (on_cuda(plain, monkeypatch, order, run, shape) for order in ("forwards", "backwards"))
    assert one.equal(other)


FAULTS = {
    "a barrier before the sum is read": (
        [
            (
                "cuda/launch.cuh",
                "warps[threadIdx.x / 32] = value;\n  __syncthreads();",
                "warps[threadIdx.x / 32] = value;",
            )
        ],
        loss,
    ),
    "a barrier between two sums": (
        [("cuda/launch.cuh", "__syncthreads();  // an earlier sum may still be read", "")],
        loss,
    ),
    "an element past the end": ([("cuda/launch.cuh", "if (i < left) four.v[i]", "if (i <= left) four.v[i]")], loss),
    "a thread block one element late": (
        [("cuda/launch.cuh", "* kBlock + threadIdx.x * kFour}", "* kBlock + threadIdx.x * kFour + (blockIdx.x > 2)}")],
        step,
    ),
    "the wrong branch's noise": ([("cuda/paired_step.cu", "churn_stream(a.step + 1,", "churn_stream(a.step,")], step),
    "a barrier that some threads miss": (
        [
            (
                "cuda/fdfo_loss.cu",
                "  __syncthreads();\n  if (is_last)",
                "  if (threadIdx.x < 99) __syncthreads();\n  if (is_last)",
            )
        ],
        loss,
    ),
    "a last block that never comes": ([("cuda/fdfo_loss.cu", "== gridDim.x - 1", "== gridDim.x")], loss),
}


def all_agree(name):
    """Whether a build with the fault of this name passes for right; the process may be aborted instead."""
    faults, run = FAULTS[name]
    module, right = built("fault", faults=tuple(faults)), []
    for shape in SHAPES[1:]:
        for order in ("forwards", "backwards"):
            with pytest.MonkeyPatch.context() as patch:
                right.append(agrees(run, on_cuda(module, patch, order, run, shape), run(shape, "cpp")))
    return all(right)


def contracted_agrees():
    """Whether multiplications and additions of a build with contraction give the same bits."""
    module = built("contracted", contraction=CONTRACTED)
    with pytest.MonkeyPatch.context() as patch:
        return all(on_cuda(module, patch, "forwards", run, SHAPES[-1]).equal(run(SHAPES[-1], "cpp")) for run in EXACT)


def told(call):
    """What `call` of this module returns in a process of its own: a process takes one build."""
    script = f"from offgpu.test_cuda_sources import all_agree, contracted_agrees\nprint('verdict', {call})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "verdict" in done.stdout or "emulated CUDA: " in done.stderr, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(name):
    assert "verdict True" not in told(f"all_agree({name!r})").stdout


def test_a_contraction_shows():
    assert "verdict False" in told("contracted_agrees()").stdout


def test_threads_that_miss_a_barrier_are_told():
    done = told("all_agree('a barrier that some threads miss')")
    assert done.returncode == -signal.SIGABRT
    assert "emulated CUDA: some threads are at a barrier" in done.stderr
