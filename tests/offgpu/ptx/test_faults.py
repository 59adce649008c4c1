"""Faults planted in compiled kernels show: as the executor's own words, or in the results."""

import pytest
from offgpu import pair_runs
from offgpu.ptx import block_runs
from offgpu.ptx.faults import contracted, everywhere, moved, outcome, replaced, without_barrier
from offgpu.ptx.plugin import DRIVER

SLOW = pytest.mark.slow
GUARD = r"@!?%p\d+ (?=\s*{}\.global)"
OUT_OF_BOUNDS, RACE, DIFFERENT = "out of bounds", "race in shared memory", "other results"


def pair_run(name, shape=(2, 9, 63)):
    run = getattr(pair_runs, name)
    return lambda: [run(shape, "triton")]


RUNS = {name: pair_run(name) for name in ("philox", "noise", "step", "replay", "direction", "loss")}
RUNS |= {
    name: getattr(block_runs, name)
    for name in (
        "gated_residual",
        "gated_residual_norm",
        "qk_rms_norm",
        "adapted_projection",
        "heads",
        "projections_to_heads",
    )
}

REDUNDANT_BARRIERS = {
    ("philox", "philox_normal"): 0,
    ("noise", "paired_noise"): 1,
    ("replay", "replay"): 1,
    ("step", "paired_step"): 0,
    ("direction", "pair_direction"): 0,
    ("loss", "fdfo_loss_forward"): 0,
    ("gated_residual_norm", "layer_norm_modulate_backward"): 0,
    ("qk_rms_norm", "qk_rms_norm_backward"): 0,
    ("adapted_projection", "lora_linear"): 2,
    ("adapted_projection", "lora_linear_input"): 3,
    ("adapted_projection", "lora_linear_rank_product"): 0,
    ("adapted_projection", "lora_linear_rank_gradient"): 1,
    ("adapted_projection", "lora_linear_factors"): 1,
}
"""Kernels with barriers, and how many stand between accesses of different addresses: nobody can miss those."""

IN_SHORT = {"direction", "qk_rms_norm"}


@pytest.mark.parametrize(
    ("run", "kernel", "redundant"),
    [
        pytest.param(*names, redundant, marks=() if names[0] in IN_SHORT else SLOW)
        for names, redundant in REDUNDANT_BARRIERS.items()
    ],
)
def test_every_barrier_is_missed(run, kernel, redundant):
    RUNS[run]()
    barriers = DRIVER.texts[f"{kernel}_kernel"].count("bar.sync")
    found = [outcome(RUNS[run], f"{kernel}_kernel", without_barrier(i)) for i in range(barriers)]
    missed = [each for each in found if RACE in each]
    assert barriers - len(missed) == redundant, found


FAULTS = {
    "a mask of loads ignored": ("direction", "pair_direction", everywhere(GUARD.format("ld")), OUT_OF_BOUNDS),
    "a mask of stores ignored": ("direction", "pair_direction", everywhere(GUARD.format("st")), OUT_OF_BOUNDS),
    "a load one element late": ("direction", "pair_direction", moved(r"ld\.global", 4), DIFFERENT),
    "the last store one element late": ("noise", "paired_noise", moved(r"st\.global", 4, -1), "race in global"),
    "a store of a sum one too far": ("direction", "pair_direction", moved(r"st\.shared", 8), OUT_OF_BOUNDS),
    "a vector at an odd address": ("direction", "pair_direction", moved(r"ld\.shared", 4), "no multiple of"),
    "a shuffle between other lanes": (
        "direction", "pair_direction", everywhere(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )16", r"\g<1>8"), DIFFERENT,
    ),
    "noise with contraction": ("noise", "paired_noise", contracted, DIFFERENT),
    "rows of a product swapped": (
        "heads", "lora_linear", replaced(r"(mma\S+\s*\{[^}]*\},\s*\{\s*)(%\w+), (%\w+)", r"\1\3, \2"), DIFFERENT,
    ),
    "a copy that nobody waits for": (
        "heads", "lora_linear", replaced(r"cp\.async\.wait_group\s+\d;", "cp.async.wait_group 4;"), DIFFERENT,
    ),
    "masks of tokens ignored": (
        "gated_residual", "gated_residual_backward", everywhere(GUARD.format("ld")), OUT_OF_BOUNDS,
    ),
}  # fmt: skip

LARGE = {
    "a copy that is not masked": (
        "adapted_projection", "lora_linear", replaced(r"(cp\.async\.c[^;]*, 0x\w+), %r\d+;", r"\1;", -1), OUT_OF_BOUNDS,
    ),
    "a matrix not transposed": (
        "adapted_projection", "lora_linear_input", replaced(r"(ldmatrix\S*)\.trans", r"\1"), DIFFERENT,
    ),
    "a step with contraction": ("step", "paired_step", contracted, DIFFERENT),
    "results stored one row late": (
        "adapted_projection", "lora_linear", moved(r"st\.global", 2 * 136), "race in global",
    ),
    "heads of the other stream": ("projections_to_heads", "lora_linear", moved(r"st\.shared", 16), RACE),
}  # fmt: skip


@pytest.mark.parametrize(
    ("run", "kernel", "edit", "shows"),
    [*FAULTS.values(), *(pytest.param(*fault, marks=SLOW) for fault in LARGE.values())],
    ids=[*FAULTS, *LARGE],
)
def test_a_planted_fault_shows(run, kernel, edit, shows):
    assert shows in outcome(RUNS[run], f"{kernel}_kernel", edit)


ON_SM_90 = {
    "a product that nobody waits for": (r"(wgmma\.wait_group\S+\s+)0;", r"\g<1>4;", DIFFERENT),
    "a product before its operands are there": (r"(fence\.proxy\S*;\s*)bar\.sync\s+0;", r"\1", RACE),
    "operands swapped": (r"(wgmma\.mma_async[^}]*\}, )(%rd\d+), (%rd\d+)", r"\1\3, \2", DIFFERENT),
    "an operand not transposed": (r"(wgmma\.mma_async[^;]*, 1, 1, 0), 0;", r"\1, 1;", DIFFERENT),
    "a sum from the start": (r"(wgmma\.mma_async[^;]*), %p\d+, 1, 1", r"\1, 0, 1, 1", DIFFERENT),
}


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "by", "shows"), ON_SM_90.values(), ids=ON_SM_90)
def test_a_fault_in_a_product_of_warpgroups_shows(pattern, by, shows, monkeypatch):
    monkeypatch.setattr(DRIVER, "capability", 90)
    assert shows in outcome(RUNS["adapted_projection"], "lora_linear_kernel", replaced(pattern, by, nth=-1))
