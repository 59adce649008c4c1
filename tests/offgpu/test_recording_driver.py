"""An engine on a GPU that is not there, down to CUDA's functions: its graphs capture, and no step waits for anything.

What this can't tell: what kernels compute, how long they take, and what a driver does with several GPUs.
"""

import functools

import pytest
from offgpu import recorded_gpu
from offgpu.recorded_steps import (
    BLOCK_PAIRS,
    FAULTS,
    IN_A_CAPTURE,
    MICRO_BATCH,
    OPTIMIZER_STEPS,
    PAIRS,
    SIZES,
    STEPS,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(recorded_gpu.LIMIT_S),
    pytest.mark.skipif(bool(recorded_gpu.missing()), reason=recorded_gpu.missing()),
]

BLOCKS = PAIRS // BLOCK_PAIRS
MICRO_BATCHES = PAIRS * 2 * STEPS // MICRO_BATCH
FORWARDS = BLOCKS * STEPS

WAITS_OF_A_ROLLOUT = {
    "models/finite.py require_finite_images": BLOCKS,
    "rollout/sampler.py _check_latents": BLOCKS,
    "rollout/blocks.py _distance": 1,
}
"""How often the host stands still in an epoch, by place: none of them in a step."""

WAITS_OF_AN_UPDATE = {
    "update/zero.py _gradient_norm": 3 * OPTIMIZER_STEPS,
    "update/zero.py step": 4 * OPTIMIZER_STEPS,
    "update/zero.py weight_bits": 2,
    "update/totals.py over_ranks": 2,
    "update/totals.py update_metrics": 1,
}
"""None of them in a micro-batch."""

PAGEABLE_OF_AN_UPDATE = {
    "update/zero.py _gradient_norm": OPTIMIZER_STEPS,
    "update/zero.py step": OPTIMIZER_STEPS,
    "update/totals.py over_ranks": 1,
}

EAGER = ["a value is read", "a pageable copy", "all is waited for", "memory is not given back", "ranks are asked"]
EAGER += ["DeepSpeed's clock"]
IN_GRAPHS = ["a value is read in the graph", "a copy in the graph", "the parameters themselves"]


@functools.cache
def steady():
    return recorded_gpu.ran("offgpu.recorded_steps", "steady", EAGER)


@functools.cache
def graphs():
    return recorded_gpu.ran("offgpu.recorded_steps", "graphs", IN_GRAPHS)


def found(asked, kind):
    """How often `kind` of event, by place; those of all names that begin so."""
    counts = {}
    for text, count in asked["places"].items():
        if text.startswith(kind):
            place = text.rsplit(": ", 1)[1]
            counts[place] = counts.get(place, 0) + count
    return counts


@pytest.mark.parametrize("run", [steady, graphs])
def test_no_step_and_no_micro_batch_is_waited_for(run):
    """Nor do DeepSpeed, on one rank, and what is asked of the ranks between micro-batches."""
    rollout, update = run()[""]["rollout"], run()[""]["update"]
    assert found(rollout, "wait") == WAITS_OF_A_ROLLOUT
    assert found(rollout, "copy of pageable memory") == {"rollout/blocks.py _distance": 1}
    assert found(update, "wait") == WAITS_OF_AN_UPDATE
    assert found(update, "copy of pageable memory") == PAGEABLE_OF_AN_UPDATE


@pytest.mark.parametrize("run", [steady, graphs])
def test_the_steady_state_allocates_nothing(run):
    for part in run()[""].values():
        assert not found(part, "allocation")
        assert not part["unmodelled"]


@pytest.mark.parametrize("fault", EAGER)
def test_a_planted_wait_or_allocation_shows(fault):
    right, wrong = steady()[""], steady()[fault]
    more = {
        part: sum(found(wrong[part], "").values()) - sum(found(right[part], "").values())
        for part in ("rollout", "update")
    }
    assert more["update"] >= MICRO_BATCHES
    assert more["rollout"] >= (0 if fault == "ranks are asked" else FORWARDS)


def test_graphs_capture_and_replay():
    """One of a rollout's forward, and two of a micro-batch; a step and a micro-batch then launch little beside them."""
    first, later = graphs()["first"], graphs()[""]
    assert [first[part]["events"]["capture"] for part in ("rollout", "update")] == [1, 2]
    for epoch in (first, later):
        for part in epoch.values():
            assert not [name for name in part["events"] if name.startswith(("refused", "a launch beside"))]
    assert replays(later["rollout"]) == FORWARDS
    assert replays(later["update"]) == 2 * MICRO_BATCHES
    assert "capture" not in later["rollout"]["events"] | later["update"]["events"]


def replays(asked):
    return sum(count for name, count in asked["events"].items() if name.startswith("replay"))


def test_a_value_read_in_a_graph_is_refused():
    asked = graphs()["a value is read in the graph"]["rollout"]
    assert asked["events"]["refused: cudaStreamSynchronize of what is captured"] == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("a copy in the graph", "unless the CPU tensor is pinned"),
        ("the parameters themselves", "stale reference to the default stream"),
    ],
)
def test_what_torch_itself_refuses_in_a_capture(fault, told):
    """Without leaves of its own the backward of the training step can't be captured."""
    assert told in graphs()[fault]["error"]


def test_no_kernel_is_compiled_again_for_another_batch_step_or_seed():
    """Triton's own count, of what it hands to the driver: sizes of 1 and of multiples of 16 are special to it."""
    first, later = recorded_gpu.ran("offgpu.recorded_steps", "loads", SIZES)
    assert {"load: lora_linear_kernel", "load: paired_step_kernel", "load: fdfo_loss_backward_kernel"} <= set(first)
    assert later == []


def test_the_rules_of_a_capture():
    refused = recorded_gpu.ran("offgpu.recorded_steps", "rules")
    allowed = ["nothing", "work on another stream and back", "two streams outside"]
    assert [name for name, why in refused.items() if not why] == allowed
    assert refused["the default stream waits"] == ["refused: the legacy stream waits for a captured event"]
    assert set(refused) == set(IN_A_CAPTURE)


def test_every_fault_is_planted_somewhere():
    assert set(FAULTS) == {*EAGER, *IN_GRAPHS}
