"""Saving beside the training: what is begun is a copy, what fails is told, what ends waits, and the best stays."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file
from tiny_sd3 import tiny_config

from fdfo_engine import Engine
from fdfo_engine.loop import run
from fdfo_engine.rewards import register
from fdfo_engine.runtime import run_checkpoints
from fdfo_engine.runtime.best_checkpoint import Best, note_best, read_best
from fdfo_engine.runtime.checkpoint import CheckpointStore
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.run_folder import checkpoint_store, read_log


@pytest.fixture
def gate(monkeypatch):
    """While it is shut, a checkpoint that is being written waits behind it."""
    gate, save = threading.Event(), CheckpointStore.save

    def behind_the_gate(*arguments):
        assert gate.wait(60)
        return save(*arguments)

    monkeypatch.setattr(CheckpointStore, "save", behind_the_gate)
    yield gate
    gate.set()


def trained(engine):
    """After one more epoch, with any rewards."""
    rollout = engine.rollout(["a red circle", "one cat"])
    engine.update(rollout, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def weights(folder, epoch):
    return load_file(folder / f"checkpoints/epoch_{epoch:06d}/weights.safetensors")


def test_training_goes_on_meanwhile_and_what_is_written_is_of_before(tiny_sd3, tmp_path, gate):
    told = []
    config = tiny_config(tiny_sd3, tmp_path / "run", update={"ema": 0.5})
    with Engine(config, on_event=lambda event: told.append((event.type, event.data.epoch))) as engine:
        trained(engine)
        engine.notes = {"list": [1]}
        before, average = engine.trained_weights("raw"), {n: t.clone() for n, t in engine.ema.items()}
        path = engine.begin_save()
        engine.notes["list"].append(2)
        trained(engine)
        engine.saving.finish(wait=False)
        assert not path.exists()
        assert ("checkpoint", 1) not in told
        gate.set()
        engine.saving.finish(wait=True)
        assert told.count(("checkpoint", 1)) == 1
        engine.saving.finish(wait=True)
        assert told.count(("checkpoint", 1)) == 1
        kept = weights(tmp_path / "run", 1)
        assert all(torch.equal(kept[name], value) for name, value in before.items())
        assert any(not torch.equal(kept[name], value) for name, value in engine.trained_weights("raw").items())
        kept = load_file(path / "ema.safetensors")
        assert all(torch.equal(kept[name], value) for name, value in average.items())
        assert json.loads((path / "state.json").read_text())["notes"] == {"list": [1]}


def test_there_are_never_two_copies(tiny_sd3, tmp_path, gate):
    with Engine(tiny_config(tiny_sd3, tmp_path / "run")) as engine:
        engine.begin_save()
        trained(engine)
        threading.Timer(0.3, gate.set).start()
        engine.begin_save()
        assert checkpoint_store(tmp_path / "run").names()[0] == "epoch_000000"
    assert checkpoint_store(tmp_path / "run").names() == ["epoch_000000", "epoch_000001"], "closing waits"


def test_to_load_waits_for_what_is_being_written(tiny_sd3, tmp_path, gate):
    with Engine(tiny_config(tiny_sd3, tmp_path / "run")) as engine:
        trained(engine)
        engine.begin_save()
        threading.Timer(0.3, gate.set).start()
        assert engine.load()
        assert engine.epoch == 1


def failing_at(monkeypatch, name):
    """The storage refuses the checkpoint `name`."""
    save = CheckpointStore.save

    def refuses(store, wanted, *arguments):
        if wanted == name:
            raise CheckpointError("no space left on the moon")
        return save(store, wanted, *arguments)

    monkeypatch.setattr(CheckpointStore, "save", refuses)


def test_a_save_that_failed_is_told_before_the_next_and_the_one_before_is_whole(tiny_sd3, tmp_path, monkeypatch):
    failing_at(monkeypatch, "epoch_000002")
    with pytest.raises(CheckpointError, match="no space left on the moon"):
        run(tiny_config(tiny_sd3, tmp_path / "run", run={"dir": str(tmp_path / "run"), "epochs": 9}))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"], status["last_checkpoint"]) == ("failed", 7, "epoch_000001")
    assert status["epoch"] <= 3, "it did not train on for long"
    assert checkpoint_store(tmp_path / "run").load(strict=True).name == "epoch_000001"


def test_of_the_last_save_the_failure_is_told_too(tiny_sd3, tmp_path, monkeypatch):
    failing_at(monkeypatch, "epoch_000003")
    with pytest.raises(CheckpointError, match="no space left on the moon"):
        run(tiny_config(tiny_sd3, tmp_path / "run"))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 7)


def test_a_run_whose_reward_fails_ends_with_its_last_epoch_committed(tiny_sd3, tmp_path, monkeypatch):
    save, seen = run_checkpoints._watched_save, []
    slowly = lambda *arguments: (threading.Event().wait(0.4), save(*arguments))  # noqa: E731
    monkeypatch.setattr(run_checkpoints, "_watched_save", slowly)

    def fails_in_epoch_3(prompts, images):
        seen.append(len(images))
        if len(seen) == 5:  # two blocks an epoch
            raise CheckpointError("anything that ends a run at once")
        return images.flatten(1).mean(1)

    with pytest.raises(CheckpointError, match="ends a run at once"):
        run(tiny_config(tiny_sd3, tmp_path / "run"), rewards=[fails_in_epoch_3])
    assert checkpoint_store(tmp_path / "run").names()[-1] == "epoch_000002"
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["last_checkpoint"] == "epoch_000002"


HELD_OUT = {"at": 0, "means": []}


@register("held_out_as_told")
def held_out_as_told(prompts, images):
    """Of training images their brightness; of an evaluation, which has three of them, the next mean of a list."""
    if len(images) != 3:
        return images.flatten(1).mean(1)
    HELD_OUT["at"] += 1
    return torch.full((3,), HELD_OUT["means"][HELD_OUT["at"] - 1])


def evaluated(pipeline, folder, means, epochs):
    """A run that evaluates before its first epoch and after each."""
    HELD_OUT.update(at=0, means=means)
    config = tiny_config(
        pipeline, folder / "run", run={"dir": str(folder / "run"), "epochs": epochs},
        rewards=[{"name": "held_out_as_told", "weight": 1.0}], evaluation={"every": 1, "count": 3, "batch": 3},
    )  # fmt: skip
    run(config)
    return checkpoint_store(folder / "run").names()


def test_the_best_by_held_out_reward_stays_beside_the_newest(tiny_sd3, tmp_path):
    names = evaluated(tiny_sd3, tmp_path, [0.2, 0.1, 0.7, 0.3, 0.2, 0.7], epochs=5)
    assert names == ["epoch_000002", "epoch_000004", "epoch_000005"], "a tie is no better"
    assert read_best(tmp_path / "run").name == "epoch_000002"
    assert read_best(tmp_path / "run").reward == pytest.approx(0.7)
    assert [line["reward"] for line in read_log(tmp_path / "run/evaluations.jsonl")][2] == pytest.approx(0.7)
    assert evaluated(tiny_sd3, tmp_path, [0.9, 0.4], epochs=7) == ["epoch_000006", "epoch_000007"], "it is replaced"
    assert read_best(tmp_path / "run").name == "epoch_000006"


@pytest.mark.slow
def test_what_is_worse_than_the_untrained_model_is_no_best(tiny_sd3, tmp_path):
    assert evaluated(tiny_sd3, tmp_path, [0.9, 0.8, 0.7, 0.6], epochs=3) == ["epoch_000002", "epoch_000003"]
    assert read_best(tmp_path / "run") is None


def test_a_save_forgets_a_best_of_later_and_is_refused_among_checkpoints_of_another(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run")
    with Engine(config) as engine:
        (tmp_path / "run").mkdir(exist_ok=True)
        note_best(tmp_path / "run", Best("epoch_000009", 1.0, 0.1))
        engine.save()
        assert read_best(tmp_path / "run") is None
    with Engine(config) as another:
        with pytest.raises(CheckpointError, match="holds epoch_000000, which this engine neither loaded nor saved"):
            another.save()
        assert another.load()
        another.save()
