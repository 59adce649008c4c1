"""What a run tells, to the files of its folder, to its caller and to a person; and what Ctrl-C does."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from tiny_sd3 import tiny_config

import fdfo_engine
from fdfo_engine.loop import run
from fdfo_engine.rollout.sampler import PairedSampler
from fdfo_engine.runtime import run_status, stop, terminal
from fdfo_engine.runtime.errors import EnvironmentProblem, Stopped, UsageError
from fdfo_engine.runtime.event_log import read_events
from fdfo_engine.runtime.run_status import read_status
from fdfo_engine.update.zero import ZeroTrainer


def left_bright(prompts, images):
    left, right = images.chunk(2, -1)
    return 100 * (left - right).flatten(1).mean(1)


def right_bright(prompts, images):
    return -left_bright(prompts, images)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_a_notebook(tiny_sd3, tmp_path):
    """Own functions as rewards, a listener, and the metrics back; the file tells the same."""
    heard = []
    config = tiny_config(tiny_sd3, tmp_path, run={"epochs": 2}, evaluation={"every": 2, "count": 2})
    metrics = fdfo_engine.run(config, rewards=[left_bright], on_event=heard.append)
    assert metrics == rows(tmp_path)
    assert [row["epoch"] for row in metrics] == [1, 2]
    assert f"reward_{__name__}:left_bright_mean" in metrics[0] or "reward_left_bright_mean" in metrics[0]
    kept = list(read_events(tmp_path))
    assert [event.seq for event in kept] == list(range(1, len(kept) + 1))
    plain = [(e.type, e.data.model_dump(mode="json", exclude={"values"})) for e in kept]
    assert plain == [(e.type, e.data.model_dump(mode="json", exclude={"values"})) for e in heard]
    epochs = [event.data.values for event in kept if event.type == "metrics" and event.data.kind == "epoch"]
    assert [row["reward_mean"] for row in epochs] == [row["reward_mean"] for row in metrics]
    phases = list(dict.fromkeys(event.data.name for event in kept if event.type == "phase"))
    assert phases == ["loading", "evaluation", "scoring", "prompts", "rollout", "reward", "update"]
    states = [event.data.state for event in kept if event.type in ("state", "done")]
    assert states == ["starting", "running", "finished", "finished"]
    for event in kept:
        if event.type == "images":
            assert all((tmp_path / file).is_file() for file in event.data.files)


def test_functions_are_named_and_may_be_defined_anew(tiny_sd3, tmp_path):
    def own(prompts, images):
        return left_bright(prompts, images)

    first = run(tiny_config(tiny_sd3, tmp_path / "a", run={"epochs": 1}), rewards=[own, right_bright])

    def own(prompts, images):
        return right_bright(prompts, images)

    second = run(tiny_config(tiny_sd3, tmp_path / "b", run={"epochs": 1}), rewards=[own])
    assert first[0]["reward_own_mean"] == pytest.approx(-second[0]["reward_own_mean"])
    with pytest.raises(UsageError, match="two are named 'own'"):
        run(tiny_config(tiny_sd3, tmp_path / "c"), rewards=[own, own])
    own.__qualname__, own.__module__ = "brightness", "__main__"
    with pytest.raises(UsageError, match="'brightness' is the name of a registered reward"):
        run(tiny_config(tiny_sd3, tmp_path / "c"), rewards=[own])
    with pytest.raises(UsageError, match="'text' is a str; takes functions"):
        run(tiny_config(tiny_sd3, tmp_path / "c"), rewards=["text"])


def test_an_error_of_the_listener_ends_the_run_and_reaches_the_caller(tiny_sd3, tmp_path):
    def fail(event):
        if event.type == "phase" and event.data.name == "update":
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(tiny_config(tiny_sd3, tmp_path), on_event=fail)
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["exit_code"]) == ("failed", 1)
    run(tiny_config(tiny_sd3, tmp_path))
    assert read_status(tmp_path)["state"] == "finished"


def test_a_failure_before_the_model_is_there_is_in_the_events(tiny_sd3, tmp_path, monkeypatch):
    def load(*_):
        raise EnvironmentProblem("a part of it is damaged")

    monkeypatch.setattr("fdfo_engine.engine.load_model", load)
    with pytest.raises(EnvironmentProblem, match="damaged"):
        run(tiny_config(tiny_sd3, tmp_path / "run"))
    told = [(event.type, getattr(event.data, "state", None)) for event in read_events(tmp_path / "run")]
    assert told[0] == ("state", "starting")
    assert told[-3:] == [("error", None), ("state", "failed"), ("done", "failed")]


def test_warnings_are_events(tiny_sd3, tmp_path):
    def blind(prompts, images):
        return torch.full((len(images),), torch.nan) if prompts[0] == "one cat" else left_bright(prompts, images)

    run(tiny_config(tiny_sd3, tmp_path, run={"epochs": 1}, update={"max_bad_pairs": 1.0}), rewards=[blind])
    cautions = [event.data.message for event in read_events(tmp_path) if event.type == "warning"]
    assert any("have no reward and pull at nothing" in message for message in cautions)


def interrupted(monkeypatch, at, presses=1):
    """Sends SIGINT in the given call of `ZeroTrainer.backward`; the later ones as a person would."""
    monkeypatch.setattr(stop, "AGAIN_S", 0.2)
    calls, original = [], ZeroTrainer.backward

    def backward(self, loss, *, last):
        original(self, loss, last=last)
        calls.append(1)
        for _ in range(presses if len(calls) == at else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.7)

    monkeypatch.setattr(ZeroTrainer, "backward", backward)


def test_ctrl_c_amid_an_update_says_so_and_the_epoch_is_finished(tiny_sd3, tmp_path, monkeypatch, capsys):
    interrupted(monkeypatch, at=10)
    with pytest.raises(Stopped, match="SIGINT: stopped after epoch 2"):
        run(tiny_config(tiny_sd3, tmp_path, checkpoint={"every": 9}), rewards=[left_bright])
    assert "SIGINT: finishing epoch 2" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_000002"]


@pytest.mark.parametrize(("at", "kept"), [(9, "epoch_000001"), pytest.param(15, None, marks=pytest.mark.slow)])
def test_ctrl_c_again_leaves_at_once_and_resumable(tiny_sd3, tmp_path, monkeypatch, capsys, at, kept):
    """In the first optimiser step of epoch 2 no weight has changed yet: epoch 1 can still be saved."""
    config = tiny_config(tiny_sd3, tmp_path / "broken", checkpoint={"every": 9})
    with monkeypatch.context() as patch:
        interrupted(patch, at=at, presses=2)
        with pytest.raises(Stopped, match="SIGINT: stopped amid the update, at"):
            run(config, rewards=[left_bright])
    assert "leaving now; the same command goes on" in capsys.readouterr().out
    assert (read_status(tmp_path / "broken")["state"], read_status(tmp_path / "broken")["exit_code"]) == ("stopped", 75)
    folder = tmp_path / "broken/checkpoints"
    assert [path.name for path in folder.iterdir()] == [kept] if kept else not folder.exists()
    whole = run(tiny_config(tiny_sd3, tmp_path / "whole", checkpoint={"every": 9}), rewards=[left_bright])
    again = run(config, rewards=[left_bright])
    assert [row["grad_norm"] for row in again] == [row["grad_norm"] for row in whole]


def test_status_is_renewed_while_the_main_thread_is_busy(tiny_sd3, tmp_path, monkeypatch):
    """A block that takes long: the heartbeat goes on, and says since when nothing has moved."""
    monkeypatch.setattr(run_status, "HEARTBEAT_S", 0.1)
    seen, original = [], PairedSampler.sample_block

    def slow(self, network, prompts, pair_ids):
        if list(pair_ids) == [2, 3]:
            time.sleep(0.6)
            first = read_status(tmp_path)
            time.sleep(0.9)
            seen.extend([first, read_status(tmp_path)])
        return original(self, network, prompts, pair_ids)

    monkeypatch.setattr(PairedSampler, "sample_block", slow)
    run(tiny_config(tiny_sd3, tmp_path, run={"epochs": 1}))
    first, second = seen
    assert second["heartbeat"] > first["heartbeat"]
    assert second["progress_at"] == first["progress_at"] < first["heartbeat"]
    shown = {key: second[key] for key in ("phase", "done", "total", "unit")}
    assert shown == {"phase": "rollout", "done": 4, "total": 8, "unit": "images"}
    assert second["eta_s"] > 0


def test_lines_tell_how_far_it_is_where_there_is_no_terminal(tiny_sd3, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "PLAIN_S", 0.2)
    original = PairedSampler.sample_block

    def slow(self, network, prompts, pair_ids):
        time.sleep(0.6)
        return original(self, network, prompts, pair_ids)

    monkeypatch.setattr(PairedSampler, "sample_block", slow)
    run(tiny_config(tiny_sd3, tmp_path, run={"epochs": 1}))
    out = capsys.readouterr().out
    assert "rollout 0/8 images\n" in out
    assert "rollout 4/8 images, " in out
    assert ", left " in out


def test_a_run_leaves_no_thread(tiny_sd3, tmp_path):
    run(tiny_config(tiny_sd3, tmp_path, run={"epochs": 1}))
    assert "ticker" not in [thread.name for thread in threading.enumerate()]
