"""A run that has saved checkpoints does not begin again because they are gone."""

import json
import shutil

import pytest
import torch

from fdfo_engine.runtime.checkpoint import CheckpointStore
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.events import Checkpoint, EventStream, Phase
from fdfo_engine.runtime.lost_checkpoints import last_saved, refuse_lost_checkpoints
from fdfo_engine.runtime.run_folder import RunFolder, checkpoint_store

CONFIG = "run: {seed: 0, epochs: 3}\n"


def run_that_saved(folder, *epochs):
    RunFolder.open(folder, CONFIG).close()
    store, log = checkpoint_store(folder), EventLog(folder)
    stream = EventStream([log])
    for epoch in epochs:
        name = f"epoch_{epoch:06d}"
        store.save(name, {"weights": {"a": torch.zeros(1)}}, {"epoch": epoch})
        stream.tell(Checkpoint(epoch=epoch, name=name))
        stream.tell(Phase(epoch=epoch, name="rollout", done=0))
    log.close()
    return store


@pytest.mark.parametrize("how", ["removed", "emptied", "dangling"])
def test_a_run_without_its_checkpoints_is_refused_and_its_logs_stay(tmp_path, how):
    folder = tmp_path / "run"
    store = run_that_saved(folder, 1, 2)
    shutil.rmtree(store.folder)
    if how == "emptied":
        store.folder.mkdir()
    elif how == "dangling":
        store.folder.symlink_to(tmp_path / "another_disk")
    before = (folder / "events.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="epoch_000002 was saved; bring it back") as caught:
        RunFolder.open(folder, CONFIG)
    assert caught.value.exit_code == 7
    assert (folder / "events.jsonl").read_bytes() == before
    with pytest.raises(CheckpointError):  # its lock was given up
        RunFolder.open(folder, CONFIG)


def test_one_that_lost_the_newest_goes_on_from_the_one_before_and_says_so(tmp_path, capsys):
    store = run_that_saved(tmp_path, 1, 2)
    shutil.rmtree(store.folder / "epoch_000002")
    RunFolder.open(tmp_path, CONFIG).close()
    assert "epoch_000002, which the run has saved, is gone; it goes on from epoch_000001" in capsys.readouterr().err


@pytest.mark.parametrize(("lost", "told"), [((3,), "from epoch_000002"), ((2, 3), "from epoch_000001"), ((1, 2), None)])
def test_it_goes_on_from_the_newest_that_is_there(tmp_path, capsys, lost, told):
    store = run_that_saved(tmp_path, 1, 2, 3)
    store = CheckpointStore(store.folder, keep=3)
    for epoch in (1, 2, 3):
        if not (store.folder / f"epoch_{epoch:06d}").is_dir():
            (store.folder / f"epoch_{epoch:06d}").mkdir()
    for epoch in lost:
        shutil.rmtree(store.folder / f"epoch_{epoch:06d}")
    refuse_lost_checkpoints(tmp_path, store)
    said = capsys.readouterr().err
    assert said == "" if told is None else f"epoch_000003, which the run has saved, is gone; it goes on {told}" in said


def test_one_that_never_saved_begins(tmp_path, capsys):
    run_that_saved(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1}) + "\n")
    RunFolder.open(tmp_path, CONFIG).close()
    assert capsys.readouterr().err == ""


def test_a_rollback_to_an_older_one_is_no_loss(tmp_path, capsys):
    store = run_that_saved(tmp_path, 1, 2, 1)
    assert store.names() == ["epoch_000001"]
    RunFolder.open(tmp_path, CONFIG).close()
    assert capsys.readouterr().err == ""


def test_damaged_lines_are_passed_over(tmp_path):
    run_that_saved(tmp_path, 1)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"type": "checkpoint"}\n["checkpoint"]\n"checkpoint" \xff\n{"type": "checkpoint", "data": 3}\n')
        file.write(b'{"type": "checkpoint", "data": {"name": 7}}\n')
    assert last_saved(tmp_path) == "epoch_000001"
    with pytest.raises(CheckpointError):
        refuse_lost_checkpoints(tmp_path, CheckpointStore(tmp_path / "nowhere"))


def test_one_that_is_gone_though_a_newer_one_is_there_is_no_loss(tmp_path, capsys):
    store = run_that_saved(tmp_path, 1, 2)
    (store.folder / "epoch_000003").mkdir()
    shutil.rmtree(store.folder / "epoch_000002")
    refuse_lost_checkpoints(tmp_path, store)
    assert capsys.readouterr().err == ""
