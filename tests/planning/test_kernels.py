"""What each op of a run takes is measured, recorded, and taken again by a resumed run."""

import json
from pathlib import Path

import pytest
import torch
from engine.launching import launch
from planning.kernels_worker import PREFERRED
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import ops
from fdfo_engine.engine import Engine
from fdfo_engine.models.fused import is_fused
from fdfo_engine.ops import Choices
from fdfo_engine.planning import kernels, measuring
from fdfo_engine.planning.kernel_cache import Batches, KernelCache
from fdfo_engine.planning.kernels import Kernels
from fdfo_engine.planning.measuring import Measurement, Timed, fastest
from fdfo_engine.runtime.interleaved import Spread
from fdfo_engine.runtime.kernel_record import recorded_kernels
from fdfo_engine.runtime.run_checkpoints import kernels_of_run

CPU = torch.device("cpu")


def spread(median, around=0.1):
    return Spread(median, median * (1 - around), median * (1 + around))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def all_prefer(monkeypatch):
    """Makes every later measurement find this backend the fastest of those that an op offers."""

    def prefer(backend):
        def taken(calls, device):
            return {name: spread(1.0 if name == backend else 2.0) for name in calls}

        monkeypatch.setattr(measuring, "seconds_of", taken)
        monkeypatch.setattr(kernels, "seconds_of", taken)

    return prefer


def trained(engine, epochs):
    for _ in range(epochs):
        rollout = engine.rollout(PROMPTS[:2])
        engine.update(rollout, rollout.images.mean((2, 3, 4)))
        engine.save()
    return engine.trained_weights()


def config_in(tiny_sd3, folder, **sections):
    return tiny_config(tiny_sd3, folder, **{"kernels": {"tune": True}, **sections})


def same(one, other):
    return all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        ({"cpp": spread(1.0), "torch": spread(2.0)}, "cpp"),
        ({"cpp": spread(2.0), "torch": spread(1.0)}, "torch"),
        ({"cpp": spread(1.1), "torch": spread(1.0)}, "cpp"),  # within the noise: what the fixed order takes
        ({"triton": spread(3.0), "triton_ends": spread(2.0), "torch": spread(1.0)}, "torch"),
        ({"auto": Spread(0.0, 0.0, 0.0)}, "auto"),
    ],
)
def test_another_is_taken_only_where_it_is_faster_by_more_than_noise(seconds, taken):
    assert fastest(seconds) == taken


def test_an_item_is_sampled_once_and_trained_once():
    timed = Timed({"cpp": spread(8.0), "torch": spread(4.0)}, {"cpp": spread(6.0), "torch": spread(9.0)})
    found = timed.per_item(rollout_batch=4, train_batch=3)
    assert found["cpp"].median == pytest.approx(8 / 4 + 6 / 3)
    assert found["torch"].median == pytest.approx(4 / 4 + 9 / 3)


def test_a_measurement_times_each_shape_once_a_pass_and_changes_no_result():
    x, y, gate = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8), torch.randn(2, 8)
    measurement = Measurement(CPU)

    def call():
        return ops.under(measurement, ops.gated_residual, x, y, gate)

    assert call().equal(ops.gated_residual(x, y, gate))
    (met,) = measurement.met.values()
    assert list(met.training) == ["cpp", "torch"]
    assert not met.rollout
    first = dict(met.training)
    call()
    assert met.training == first
    with torch.no_grad():
        call()
    assert list(met.rollout) == ["cpp", "torch"]
    assert all(0 < of.median < 1 for of in (*met.rollout.values(), *met.training.values()))
    call().sum().backward()
    assert x.grad.equal(torch.ones_like(x))  # the graph of the call itself is whole


def test_a_backward_is_timed_although_one_argument_depends_on_another():
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = x.exp()
    measurement = Measurement(CPU)
    for _ in range(2):
        ops.under(measurement, ops.gated_residual, x * 2, y, torch.ones(2, 8))
    assert len(measurement.met) == 1


def test_an_op_takes_what_was_chosen_for_its_shape_alone(monkeypatch):
    found = []
    monkeypatch.setattr(
        ops._dispatch, "choose", lambda op, offered, device, forced=None: found.append(forced) or "torch"
    )
    x, gate = torch.randn(1, 3, 4), torch.randn(1, 4)
    choices = Choices({"gated_residual 3 4 float32": "torch"})
    ops.under(choices, ops.gated_residual, x, x, gate)
    ops.under(choices, ops.gated_residual, x[:, :2], x[:, :2], gate)
    ops.under(choices, ops.gated_residual, x.repeat(5, 1, 1), x.repeat(5, 1, 1), gate.repeat(5, 1))  # any batch
    ops.under(choices, ops.gated_residual, x, x, gate, backend="cpp")  # a name wins
    ops.gated_residual(x, x, gate)
    assert found == ["torch", None, "torch", "cpp", None]


def test_what_cannot_run_here_is_refused_not_passed_over():
    x, gate = torch.randn(1, 3, 4), torch.randn(1, 4)
    choices = Choices({"gated_residual 3 4 float32": "cuda"})
    with pytest.raises(ops.BackendUnavailableError, match="gated_residual"):
        ops.under(choices, ops.gated_residual, x, x, gate)


def test_a_run_measures_its_own_ops_and_keeps_that(tiny_sd3, tmp_path, capsys):
    with Engine(config_in(tiny_sd3, tmp_path / "run")) as engine:
        assert is_fused(engine.model.network)
        found = engine.kernels
        engine.save()
    names = {name.split()[0] for name in found.backends}
    assert names >= {"gated_residual_norms", "adapted_projections", "feed_forward", "attention", "pair_ops"}
    assert all(of[found.backends[name]].median <= 1.0 for name, of in found.measured.items())
    assert "pair_ops" in capsys.readouterr().out
    recorded = recorded_kernels(tmp_path / "run")
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    assert recorded == json.loads(state.read_text())["kernels"] == found.backends


def test_the_cache_spares_the_next_run_the_measurement(tiny_sd3, tmp_path, all_prefer):
    all_prefer("torch")
    with Engine(config_in(tiny_sd3, tmp_path / "first")) as engine:
        first = engine.kernels.backends
    all_prefer("cpp")
    with Engine(config_in(tiny_sd3, tmp_path / "second")) as engine:
        assert engine.kernels.backends == first
        assert "before" in engine.kernels.origin


def test_a_resume_where_the_cache_would_choose_otherwise_has_the_same_bits(tiny_sd3, tmp_path, all_prefer, monkeypatch):
    all_prefer("torch")
    with Engine(config_in(tiny_sd3, tmp_path / "whole")) as engine:
        assert engine.backend == "torch"
        whole = trained(engine, 2)
    with Engine(config_in(tiny_sd3, tmp_path / "broken")) as engine:
        trained(engine, 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    all_prefer("cpp")
    with Engine.resume(tmp_path / "broken") as engine:
        assert engine.backend == "torch"
        assert set(engine.kernels.backends.values()) == {"torch", "auto"}
        assert same(trained(engine, 1), whole)
    with Engine(config_in(tiny_sd3, tmp_path / "fresh")) as engine:  # the choice is seen in the bits
        assert engine.backend == "cpp"
        assert not same(trained(engine, 2), whole)


@pytest.mark.parametrize("section", [{"kernels": {"tune": False}}, {"run": {"deterministic": True}}])
def test_the_fixed_order_where_nothing_may_be_measured(section, tiny_sd3, tmp_path, all_prefer):
    all_prefer("torch")
    try:
        with Engine(config_in(tiny_sd3, tmp_path / "run", **section)) as engine:
            assert engine.kernels.backends == {}
            assert engine.backend == "cpp"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_named_backend_is_not_measured(tiny_sd3, tmp_path, all_prefer):
    all_prefer("torch")
    with Engine(config_in(tiny_sd3, tmp_path / "run", kernels={"backend": "cpp"})) as engine:
        assert engine.backend == "cpp"
        assert "pair_ops" not in " ".join(engine.kernels.backends)


def test_a_checkpoint_older_than_records_goes_on_by_the_fixed_order(tiny_sd3, tmp_path, all_prefer):
    with Engine(config_in(tiny_sd3, tmp_path / "run", kernels={"tune": False})) as engine:
        engine.save()
    (tmp_path / "run" / "kernels.json").unlink()
    assert kernels_of_run(tmp_path / "run") == {}
    assert kernels_of_run(tmp_path / "nowhere") is None


def test_a_damaged_cache_is_said_and_measured_again(capsys):
    cache = KernelCache(CPU, Batches(2, 3))
    cache.save({"an op": Timed({"cpp": spread(1.0)}, {})})
    assert KernelCache(CPU, Batches(2, 3)).load() == {"an op": Timed({"cpp": spread(1.0)}, {})}
    assert KernelCache(CPU, Batches(4, 3)).load() == {}
    cache.file.write_text('{"seconds": {"2, 3": {"an op": 5}}}')
    assert KernelCache(CPU, Batches(2, 3)).load() == {}
    assert "damaged" in capsys.readouterr().err


def test_a_table_says_what_is_taken():
    shown = Kernels({"op": "torch"}, "measured", {"op": {"cpp": spread(2e-6), "torch": spread(1e-6)}}).table()
    assert "cpp 2.0, *torch 1.0" in shown
    assert shown.startswith("kernels: measured; * is taken: the first, unless another is faster")
    assert Kernels({}, "by a fixed order").table() == "kernels: by a fixed order"


@pytest.mark.slow
def test_ranks_take_what_rank_0_measured(tiny_sd3, tmp_path):
    """Rank 1 has a cache of its own, and would find another backend the fastest."""
    done = launch(Path(__file__).with_name("kernels_worker.py"), tiny_sd3, tmp_path, by="torchrun", ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["kernels"] == first["asked"]
    assert len(first["kernels"]) > 4
    assert set(first["kernels"].values()) <= {PREFERRED[0], "auto"}  # auto: attention
    assert first["pair_ops"] == PREFERRED[0]
    assert [(tmp_path / f"cache{rank}" / "fdfo_engine").exists() for rank in range(2)] == [True, False]


def test_batches_are_counted_with_guidance(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run", sampling={"guidance_scale": 3.0})
    assert kernels.batches_of(config, 5) == Batches(rollout=8, train=10)
