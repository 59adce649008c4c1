"""What an engine tells while it works, and how a call on it is ended."""

import threading

import pytest
import torch
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine.engine import Engine
from fdfo_engine.runtime.errors import Cancelled, UsageError

REWARDS = torch.tensor([[0.0, 1.0]] * 4)


def told(engine_events, kind):
    return [event.data for event in engine_events if event.type == kind]


def make(pipeline, folder, events=None, **sections):
    return Engine(tiny_config(pipeline, folder, **sections), on_event=None if events is None else events.append)


def test_an_epoch_tells_its_blocks_micro_batches_and_images(tiny_sd3, tmp_path):
    events = []
    engine = make(tiny_sd3, tmp_path, events)
    metrics = engine.update(engine.rollout(PROMPTS), REWARDS)
    engine.generate(PROMPTS[:3])
    engine.save()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    phases = [(phase.epoch, phase.name, phase.done, phase.total) for phase in told(events, "phase")]
    prompts = [phase for phase in phases if phase[1] == "prompts"]  # one by one, or all at once where they were kept
    assert (prompts[0], prompts[-1]) == ((1, "prompts", 0, 4), (1, "prompts", 4, 4))
    # 2 blocks of 2 pairs; 2 optimiser steps with 2 x 2 x 2 items a block, at most 5 a micro-batch
    assert [phase for phase in phases if phase not in prompts] == [
        *[(0, "loading", done, 1) for done in (0, 1)],
        *[(1, "rollout", done, 8) for done in (0, 4, 8)],
        *[(1, "update", done, 8) for done in range(9)],
        *[(1, "generation", done, 3) for done in (0, 3)],
    ]
    assert [m.values for m in told(events, "metrics")] == [metrics]
    assert [(c.name, c.epoch) for c in told(events, "checkpoint")] == [("epoch_000001", 1)]


def test_what_is_left_follows_from_the_speed(tiny_sd3, tmp_path, monkeypatch):
    clock = iter(range(100, 1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    events = []
    make(tiny_sd3, tmp_path, events).rollout(PROMPTS)
    first, middle, last = (phase for phase in told(events, "phase") if phase.name == "rollout")
    assert (first.eta_s, first.per_second, last.eta_s) == (None, None, 0.0)
    assert middle.eta_s == pytest.approx((8 - middle.done) / middle.per_second)


def cancel_at(engine, name, done, **thread):
    """A listener that cancels once phase `name` has reached `done`."""

    def listen(event):
        if event.type == "phase" and (event.data.name, event.data.done) == (name, done):
            engine.cancel("no more of it")

    engine.progress.stream.listeners.append(listen)
    return listen


@pytest.mark.parametrize("name", ["rollout", "generation"])
def test_a_cancelled_call_leaves_the_engine_as_it_was(tiny_sd3, tmp_path, name):
    engine, other = (make(tiny_sd3, tmp_path / n, evaluation={"batch": 2, "count": 2}) for n in ("a", "b"))
    call = {"rollout": lambda e: e.rollout(PROMPTS).images, "generation": lambda e: e.generate(PROMPTS)}[name]
    listen = cancel_at(engine, name, {"rollout": 4, "generation": 2}[name])
    with pytest.raises(Cancelled, match=r"no more of it: stopped while .*, at . of . images") as caught:
        call(engine)
    assert caught.value.exit_code == 75
    engine.progress.stream.listeners.remove(listen)
    assert call(engine).equal(call(other))


@pytest.mark.parametrize(("done", "steps"), [(0, 0), (1, 0), (4, 1), (5, 1)])
def test_a_cancelled_update_says_what_the_weights_are(tiny_sd3, tmp_path, done, steps):
    engine = make(tiny_sd3, tmp_path)
    engine.save()
    rollout, before = engine.rollout(PROMPTS), engine.trainer.weights()
    cancel_at(engine, "update", done)
    words = (
        f"after {steps} optimiser steps of epoch 1: Engine.load goes back" if steps else "the weights are as they were"
    )
    with pytest.raises(
        Cancelled, match=rf"no more of it: stopped amid the update, at {done} of 8 micro-batches, {words}"
    ):
        engine.update(rollout, REWARDS)
    assert engine.epoch == 0
    assert engine.is_amid_epoch == (steps > 0)
    same = all(torch.equal(w, before[n]) for n, w in engine.trainer.weights().items())
    assert same == (steps == 0)
    if steps:
        with pytest.raises(UsageError, match="optimiser steps were taken since"):
            engine.save()


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_after_a_cancelled_update_and_load_the_next_has_the_bits_of_an_untouched_one(tiny_sd3, tmp_path, stage):
    engine, other = (make(tiny_sd3, tmp_path / name, zero={"stage": stage}) for name in ("a", "b"))
    engine.save()
    rollout = engine.rollout(PROMPTS)
    listen = cancel_at(engine, "update", 5)
    with pytest.raises(Cancelled):
        engine.update(rollout, REWARDS)
    engine.progress.stream.listeners.remove(listen)
    engine.load()
    for each in (engine, other):
        each.update(each.rollout(PROMPTS), REWARDS)
    for which in ("weights", "state"):
        one, two = (getattr(each.trainer, which)() for each in (engine, other))
        assert all(torch.equal(one[name], two[name]) for name in one | two)


def test_cancel_comes_from_any_thread_and_only_ends_what_runs(tiny_sd3, tmp_path):
    engine = make(tiny_sd3, tmp_path)
    engine.cancel("nothing runs")
    engine.rollout(PROMPTS)

    def from_elsewhere(event):
        if event.type == "phase" and event.data.done == 4:
            thread = threading.Thread(target=engine.cancel)
            thread.start()
            thread.join()

    engine.progress.stream.listeners.append(from_elsewhere)
    with pytest.raises(Cancelled, match="cancel was called"):
        engine.rollout(PROMPTS)


@pytest.mark.parametrize("name", ["rollout", "update", "generation"])
def test_an_error_of_the_callback_reaches_the_caller(tiny_sd3, tmp_path, name):
    engine = make(tiny_sd3, tmp_path)
    calls = {
        "rollout": lambda: engine.rollout(PROMPTS),
        "update": lambda: engine.update(engine.rollout(PROMPTS), REWARDS),
        "generation": lambda: engine.generate(PROMPTS),
    }

    def fail(event):
        if event.type == "phase" and event.data.name == name:
            raise ZeroDivisionError("mine")

    engine.progress.stream.listeners.append(fail)
    with pytest.raises(ZeroDivisionError, match="mine"):
        calls[name]()
    engine.progress.stream.listeners.remove(fail)
    calls[name]()
