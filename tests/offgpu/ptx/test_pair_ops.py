"""Pair ops as compiled: to the bit what their arithmetic says, and no multiplication contracted with an addition."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from offgpu import pair_runs
from offgpu.ptx.plugin import DRIVER
from offgpu.ptx.program import parsed
from ops.exact import draw

from fdfo_engine import ops

SHAPES = [(1,), (3, 5, 7), (2, 33, 63)]
ROOT = Path(__file__).resolve().parents[3]
SLOW = pytest.mark.slow
STEPS = [(dtype, guided) for dtype in (torch.float32, torch.bfloat16, torch.float16) for guided in (False, True)]
STEPS.remove((torch.bfloat16, True))
ONE_SHAPE_IN_SHORT = [pytest.param(shape, marks=() if shape == SHAPES[1] else SLOW) for shape in SHAPES]
RUNS = ("philox", "step", "direction")
COMPUTED = {"add", "sub", "mul", "fma", "mad"}
LIBRARY_FUNCTION = re.compile(r"tl\.(log|exp)\(")
"""Of Triton, in float32 and float64: their polynomials are made of fused operations, wherever they run."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_are_those_of_cpp(shape):
    assert pair_runs.direction(shape, "triton").equal(pair_runs.direction(shape, "cpp"))


@pytest.mark.parametrize(
    ("dtype", "guided"), [(torch.bfloat16, True), *(pytest.param(*case, marks=SLOW) for case in STEPS)], ids=str
)
def test_steps_without_noise_are_those_of_cpp(dtype, guided):
    shape = (2, 2, *SHAPES[1])
    x, v, uncond = draw(*shape), draw(*shape, seed=1, dtype=dtype), draw(*shape, seed=2, dtype=dtype)
    found = []
    for backend in ("triton", "cpp"):
        kept = torch.empty_like(v)
        guidance = {"v_uncond": uncond, "guidance_scale": 3.5} if guided else {}
        x_next = ops.paired_step(
            x, v, sigma=0.75, sigma_next=0.7, gamma=0.0, seed=3, pair_ids=[1, 6], step=2, v_out=kept, backend=backend,
            **guidance,
        )  # fmt: skip
        found.append((x_next, kept))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("shape", ONE_SHAPE_IN_SHORT, ids=str)
def test_noise_is_added_with_two_roundings(shape):
    pairs, gamma = torch.tensor([2, 7]), torch.tensor(0.3, dtype=torch.float64)
    found = ops.paired_noise(pairs, shape, seed=4, gamma=0.3, device="cpu", backend="triton")
    shared, *own = (
        ops.philox_normal(shape, seed=4, pair_ids=pairs, stream=stream, device="cpu", backend="triton")
        for stream in range(3)
    )
    keep, noise = (1 / (1 + gamma)).float(), (((1 + gamma) ** 2 - 1).sqrt() / (1 + gamma)).float()
    for branch in range(2):
        assert found[:, branch].equal(keep * shared + noise * own[branch])


@pytest.mark.parametrize("solver", ["churn", pytest.param("antithetic", marks=SLOW)])
def test_a_replay_is_its_steps(solver):
    """The arithmetic of both is one, as compiled too."""
    shape, sigmas = SHAPES[1], [1.0, 0.75, 0.5, 0.0]
    velocities = draw(2, 2, 3, *shape, dtype=torch.bfloat16)
    common = {"seed": 5, "backend": "triton", "solver": solver}
    x = [ops.paired_noise([3, 8], shape, gamma=0.2, device="cpu", **common)]
    for i in range(2):
        step = {"sigma": sigmas[i], "sigma_next": sigmas[i + 1], "gamma": 0.2, "pair_ids": [3, 8], "step": i}
        x.append(ops.paired_step(x[-1], velocities[:, :, i], **step, **common))
    rows = list(itertools.product(range(2), range(2), range(3)))
    places = dict(zip(("pair", "branch", "step"), torch.tensor(rows).T, strict=True))
    found = ops.replay(
        velocities, pair_ids=[3, 8], sigmas=torch.tensor(sigmas), gammas=0.2, **places, **common,
    )  # fmt: skip
    for latent, (pair, branch, steps) in zip(found, rows, strict=True):
        assert latent.equal(x[steps][pair, branch])


def fused(text):
    """Instructions that round a product together with a sum, or let an assembler do so, but for library functions."""
    program = parsed(text)
    sources = {number: source_lines(name) for number, name in program.files.items()}
    return [each.text for each in program.code if may_fuse(each) and not of_library(each, sources)]


def may_fuse(instruction):
    if instruction.name not in COMPUTED or not {"f32", "f64", "f32x2"} & set(instruction.modifiers):
        return False
    return instruction.name in ("fma", "mad") or "rn" not in instruction.modifiers


def of_library(instruction, sources):
    """By its source line; or it flushes small numbers to zero, as no instruction of ours does."""
    file, line = instruction.line
    return "ftz" in instruction.modifiers or LIBRARY_FUNCTION.search(sources[file][int(line) - 1])


def source_lines(name):
    """Of a kernel's file, wherever the checkout was when it was compiled; what is Triton's calls no library."""
    path = ROOT / "kernels" / Path(name).name
    return path.read_text().splitlines() if path.exists() else [""] * 10_000


@pytest.mark.parametrize("capability", [80, *(pytest.param(newer, marks=SLOW) for newer in (90, 100))])
@pytest.mark.parametrize("run", ["noise", "replay", "loss", *(pytest.param(run, marks=SLOW) for run in RUNS)])
def test_no_product_is_rounded_with_a_sum(run, capability, monkeypatch):
    on_sm_80 = getattr(pair_runs, run)(SHAPES[1], "triton")
    monkeypatch.setattr(DRIVER, "capability", capability)
    DRIVER.texts.clear()
    assert getattr(pair_runs, run)(SHAPES[1], "triton").equal(on_sm_80)
    assert DRIVER.texts
    for name, text in DRIVER.texts.items():
        assert not fused(text), name


def test_a_fused_product_is_told():
    pair_runs.direction(SHAPES[0], "triton")
    text = DRIVER.texts["pair_direction_kernel"]
    assert len(fused(text.replace("mul.rn.f32", "mul.f32", 1))) == 1
