"""`fdfo tune` prints what a run would take, and keeps it for one."""

import pytest
import torch

from fdfo_engine.cli.main import main
from fdfo_engine.planning import kernels, measuring
from fdfo_engine.planning.kernel_cache import KernelCache
from fdfo_engine.runtime.interleaved import Spread


@pytest.fixture(autouse=True)
def instant(monkeypatch, tmp_path):
    """A cache of its own, and plain torch three times as fast as anything else, without taking the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def taken(calls, device):
        return {name: Spread(*[1e-6 if name == "torch" else 3e-6] * 3) for name in calls}

    for module in (measuring, kernels):
        monkeypatch.setattr(module, "seconds_of", taken)


def test_it_measures_an_architecture_and_doctor_says_what_came_out(capsys):
    assert main(["tune", "--arch", "shapes", "--rollout-batch", "2", "--train-batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "feed_forward 64 96-384-96-384 float32" in out
    assert "cpp 3.0, *torch 1.0" in out
    assert main(["doctor", "--quick"]) == 0
    told = capsys.readouterr().out
    assert "2 images a forward, 2 items a micro-batch" in told
    assert "op feed_forward 64 96-384-96-384 float32 runs torch: 3.00 times as fast as cpp" in told


def test_it_measures_a_config_at_its_own_batches(capsys, tmp_path):
    words = [f"run.dir={tmp_path}", "sampling.pairs_per_epoch=2", "sampling.block_pairs=1", "update.micro_batch=3"]
    assert main(["tune", "shapes", *words]) == 0
    assert "pair_ops 4-16-16 float32" in capsys.readouterr().out
    ((batches, timed),) = KernelCache.everything(torch.device("cpu")).items()
    assert batches == (2, 3)
    assert any(name.startswith("attention") for name in timed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "shapes", "shapes"], "--arch shapes: takes the place of a config"),
        (["shapes", "--train-batch", "2"], "are for --arch"),
        ([], "no config"),
    ],
)
def test_it_refuses_what_does_not_go_together(words, message, capsys):
    assert main(["tune", *words]) == 2
    assert message in capsys.readouterr().err
