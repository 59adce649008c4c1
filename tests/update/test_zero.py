"""ZeRO stages and ranks change where numbers live, not what they are."""

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from engine.launching import launch
from safetensors.torch import load_file
from update.zero_worker import PROMPTS, REWARDS, config_of, trace

from fdfo_engine import Engine

WORKER = Path(__file__).with_name("zero_worker.py")
slow = pytest.mark.slow


def traced(pipeline, out, stage, train, *offloaded, by, ranks, threads=1):
    out.mkdir()
    done = launch(WORKER, pipeline, out, stage, train, *offloaded, by=by, ranks=ranks, OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return load_file(out / "trace.safetensors")


def traced_here(pipeline, out, stage, train="lora", *offloaded):
    out.mkdir()
    trace(pipeline, out, stage, train, **dict.fromkeys(offloaded, True))
    return load_file(out / "trace.safetensors")


@pytest.fixture(scope="module")
def plain(tiny_sd3, tmp_path_factory):
    """One rank, no ZeRO, by what is trained."""
    made = {}

    def of(train):
        if train not in made:
            made[train] = traced_here(tiny_sd3, tmp_path_factory.mktemp("plain") / train, 0, train)
        return made[train]

    return of


def part(tensors, prefix):
    return {n.removeprefix(prefix): t.double() for n, t in tensors.items() if n.startswith(prefix)}


def norm(tensors):
    return torch.stack([t.norm() for t in tensors.values()]).norm().item()


def distance(one, other):
    assert one.keys() == other.keys()
    return norm({n: one[n] - other[n] for n in one})


def assert_same_training(found, plain):
    for name in (n for n in plain if n.startswith(("latents.", "start."))):
        assert torch.equal(found[name], plain[name]), name
    gradients = part(plain, "gradient.")
    assert norm(gradients) > 1e-3
    assert distance(part(found, "gradient."), gradients) < 1e-6 * norm(gradients)
    start, end = part(plain, "start."), part(plain, "weights.")
    assert distance(part(found, "weights."), end) < 1e-3 * distance(end, start)


@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=slow)])
@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=slow) for stage in (2, 3))])
def test_one_rank_is_the_same_at_every_stage(tiny_sd3, tmp_path, plain, stage, train):
    assert_same_training(traced_here(tiny_sd3, tmp_path / "out", stage, train), plain(train))


OFFLOADS = [
    (2, "lora", "offload_optimizer"),
    *(pytest.param(case, marks=slow) for case in (
        (1, "lora", "offload_optimizer"), (3, "lora", "offload_optimizer"), (2, "full", "offload_optimizer"),
        (3, "full", "offload_optimizer", "offload_parameters"), (3, "lora", "offload_parameters"),
    )),
]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, *(pytest.param(n, marks=slow) for n in (2, 3))])
@pytest.mark.parametrize("case", OFFLOADS, ids=str)
def test_offloading_to_the_host_changes_nothing(tiny_sd3, tmp_path, plain, case, ranks):
    stage, train, *offloaded = case
    if ranks == 1:
        found = traced_here(tiny_sd3, tmp_path / "out", stage, train, *offloaded)
    else:
        threads = torch.get_num_threads()
        out, by = tmp_path / "out", "torchrun"
        found = traced(tiny_sd3, out, stage, train, *offloaded, by=by, ranks=ranks, threads=threads)
    assert_same_training(found, plain(train))


@pytest.mark.parametrize(
    ("ranks", "stage", "train"),
    [
        (2, 3, "lora"),
        *(pytest.param(2, stage, "lora", marks=slow) for stage in (0, 1, 2)),
        *(pytest.param(2, stage, "full", marks=slow) for stage in (0, 1, 2, 3)),
        *(pytest.param(3, stage, "lora", marks=slow) for stage in (0, 1, 2, 3)),
        *(pytest.param(4, stage, "lora", marks=slow) for stage in (1, 3)),
    ],
)
def test_ranks_train_as_one_and_their_checkpoint_loads_on_one(tiny_sd3, tmp_path, plain, ranks, stage, train):
    """The second epoch has a rank whose pairs all tie; it must neither hang nor count less."""
    threads = torch.get_num_threads()  # as here: the order of a sum depends on them
    by = "torchrun" if ranks == 3 else "deepspeed"
    found = traced(tiny_sd3, tmp_path / "out", stage, train, by=by, ranks=ranks, threads=threads)
    assert_same_training(found, plain(train))

    engine = Engine(config_of(tiny_sd3, tmp_path / "out", stage, train))
    assert engine.load()
    assert (engine.epoch, engine.next_pair) == (3, 18)
    for name, weight in engine.trainer.weights().items():
        assert torch.equal(weight, found[f"weights.{name}"]), name
    for name, moment in engine.trainer.state().items():
        assert torch.equal(moment, found[f"moments.{name}"]), name
    metrics = engine.update(engine.rollout(PROMPTS), torch.tensor(REWARDS[0]))
    assert metrics["optimizer_steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["flow_grpo", "awm", "nft"])
def test_groups_that_two_ranks_share_train_as_one(tiny_sd3, tmp_path, algorithm):
    """One group lies half on each rank, and its mean and the spread of all rewards are those of one rank."""
    threads = torch.get_num_threads()
    (tmp_path / "one").mkdir()
    trace(tiny_sd3, tmp_path / "one", 1, algorithm=algorithm)
    one = load_file(tmp_path / "one" / "trace.safetensors")
    two = traced(
        tiny_sd3, tmp_path / "two", 1, "lora", f"algorithm={algorithm}", by="deepspeed", ranks=2, threads=threads
    )
    assert_same_training(two, one)


@pytest.mark.slow
def test_the_shapes_run_is_the_same_on_two_ranks(tmp_path):
    """The bundled model and its config under the real launcher: latents to the bit, gradients and weights in bounds."""
    one = traced("shapes", tmp_path / "one", 1, "full", by="python", ranks=1)
    two = traced("shapes", tmp_path / "two", 1, "full", by="deepspeed", ranks=2)
    assert_same_training(two, one)


@pytest.mark.parametrize("gathers", [True, pytest.param(False, marks=slow)])
def test_a_rollout_at_stage_3_holds_whole_weights_or_gathers_them(tiny_sd3, tmp_path, monkeypatch, gathers):
    """The same images; and with whole weights, not one is gathered in a call of the network."""
    engine = Engine(config_of(tiny_sd3, tmp_path, 3, gather_rollout=gathers))
    parameters = list(engine.trainer.engine.module.parameters())

    def whole():
        return sum(p.ds_status == ZeroParamStatus.AVAILABLE for p in parameters if not p.ds_persist)

    seen, block = [], engine.sampler.sample_block

    def watched(*words):
        seen.append(whole())
        sampled = block(*words)
        seen.append(whole())
        return sampled

    monkeypatch.setattr(engine.sampler, "sample_block", watched)
    images = engine.rollout(PROMPTS).images
    sharded = sum(not p.ds_persist for p in parameters)
    assert sharded > 0
    assert set(seen) == ({sharded} if gathers else {0})
    assert whole() == 0
    plain = Engine(config_of(tiny_sd3, tmp_path / "plain", 0))
    assert torch.equal(images, plain.rollout(PROMPTS).images)


@pytest.mark.parametrize("stage", [1, 3])
def test_averaged_weights_take_the_place_of_the_last_ones_and_give_it_back(tiny_sd3, tmp_path, stage):
    engine = Engine(config_of(tiny_sd3, tmp_path, stage, "full"))
    before, own = engine.generate(PROMPTS), engine.trainer.weights()
    halves = {name: weight / 2 for name, weight in own.items()}
    with engine.trainer.weights_swapped(halves):
        inside = engine.generate(PROMPTS)
    assert torch.equal(engine.generate(PROMPTS), before)
    assert all(torch.equal(weight, own[name]) for name, weight in engine.trainer.weights().items())
    engine.trainer.load(halves, engine.trainer.state())
    assert torch.equal(engine.generate(PROMPTS), inside)
    assert not torch.equal(inside, before)


@pytest.mark.parametrize(
    ("stage", "offloads"),
    [(1, False), *(pytest.param(*case, marks=slow) for case in
                   ((0, False), (2, False), (3, False), (1, True), (2, True), (3, True)))],
)  # fmt: skip
def test_a_restored_engine_goes_on_to_the_bit(tiny_sd3, tmp_path, stage, offloads):
    """Two epochs, against one epoch, a checkpoint, another process's worth of fresh engine, and the second epoch."""
    rewards = torch.tensor(REWARDS[0])
    zero = {"offload_optimizer": offloads, "offload_parameters": offloads and stage == 3}
    whole, first = (Engine(config_of(tiny_sd3, tmp_path / name, stage, **zero)) for name in ("a", "b"))
    for engine in (whole, first):
        engine.update(engine.rollout(PROMPTS), rewards)
    first.save()
    second = Engine(config_of(tiny_sd3, tmp_path / "b", stage, **zero))
    assert second.load()
    for engine in (whole, second):
        engine.update(engine.rollout(PROMPTS), rewards)
    for name, tensor in {**whole.trainer.weights(), **whole.trainer.state()}.items():
        assert torch.equal(tensor, {**second.trainer.weights(), **second.trainer.state()}[name]), name
