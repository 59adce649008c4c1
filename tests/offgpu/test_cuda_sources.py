"""Every CUDA kernel runs on CPU tensors, compiled as C++, and gives what the C++ backend gives; planted faults show.

What the fibres can't tell: races within a warp, memory order between thread blocks, alignment, and speed.
"""

import os
import signal
import subprocess
import sys

import pytest
import torch
from offgpu.emulated_cuda import CONTRACTED, ROOT, as_backend_cuda, built
from offgpu.pair_runs import direction, loss, noise, philox, replay, step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHAPES = [(1,), (4, 8, 8), (3, 5, 7), (2, 33, 63)]
"""One element; rounds of four; an odd size; past a thread block and past a partial sum."""


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
    variables = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=variables)
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
