"""The benchmark of whole transformers: its arithmetic, and that a wrong candidate is not timed."""

import argparse
import json

import pytest
import torch

from fdfo_engine.bench import end_to_end, record
from fdfo_engine.bench.architectures import architectures, sharing
from fdfo_engine.bench.end_to_end import Candidate, candidates, measure, rates
from fdfo_engine.bench.flops import flops
from fdfo_engine.cli.bench import ARCHITECTURES
from fdfo_engine.cli.main import main
from fdfo_engine.models.lora import trainable
from fdfo_engine.runtime.interleaved import Spread

CPU = torch.device("cpu")
SHAPES = architectures()["shapes"]


def test_an_epoch_is_432_pairs_of_40_steps():
    row = rates(SHAPES, Spread(0.5, 0.4, 0.6), 20, Spread(2.0, 1.9, 2.1), 10, peak=1e12)
    assert row["images_per_s"] == pytest.approx(20 / (40 * 0.5))
    assert row["training_samples_per_s"] == pytest.approx(5.0)
    assert row["epoch_s"] == pytest.approx(864 / 1.0 + 864 * 40 / 5.0)
    assert row["mfu_training"] == pytest.approx((flops(SHAPES).forward + flops(SHAPES).backward) * 5 / 1e12)


def test_the_verb_offers_every_architecture():
    assert set(ARCHITECTURES) == set(architectures())


@pytest.mark.slow
def test_the_verb_writes_a_file_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--arch", "shapes", "--candidates", "R", "--rollout-batch", "1", "--seconds", "0.01"]) == 0
    found = json.loads((tmp_path / "fdfo_bench.json").read_text())
    assert [row["candidate"] for row in found["rows"]] == ["R"]


def test_a_wheel_tells_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "_CHECKOUT", tmp_path)
    found = record.header("fdfo bench", ["--arch", "shapes", "--out", "x.json"])
    assert (found["commit"], found["uncommitted"]) == ("", [])
    assert found["command"] == "fdfo bench --arch shapes"


def test_copies_share_frozen_weights_and_nothing_else():
    network = SHAPES.network(CPU)
    copy = sharing(network)
    adapter = {name for name, _ in trainable(network)}
    for (name, own), (_, other) in zip(network.named_parameters(), copy.named_parameters(), strict=True):
        assert (own is other) == (name not in adapter), name


@pytest.mark.slow
def test_rows_of_the_miniature():
    options = argparse.Namespace(candidates="R", rollout_batch=2, train_batch=2, seconds=0.01)
    (row,) = measure("shapes", SHAPES, CPU, options, 1e11)
    assert row["candidate"] == "R"
    assert max(row["errors"].values()) == 0.0, "on a CPU R is the reference itself"
    assert row["saved_bytes_a_sample"] > 0
    assert row["images_per_s"] > 0


def test_a_wrong_candidate_is_refused(monkeypatch):
    def broken(name, architecture, network, device, dtype):
        next(p for n, p in network.named_parameters() if "lora_B" in n).data.mul_(1.01)
        return Candidate(name, architecture, network, device, dtype)

    monkeypatch.setitem(end_to_end.MAKERS, "C", broken)
    with pytest.raises(AssertionError, match=r"C: .*gradient"):
        candidates(SHAPES, CPU, "RC")


@pytest.mark.parametrize("words", [["--candidates", "RX"], ["--arch", "sd9"], ["--train-batch", "0"]])
def test_wrong_options(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *words])
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err
