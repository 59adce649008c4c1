"""`status.json`: what events become for a frontend, and what a heartbeat says."""

import json
import os
import socket
import subprocess
import sys

import pytest

from fdfo_engine.runtime import run_status
from fdfo_engine.runtime.events import Checkpoint, Done, EventStream, Metrics, Phase, State
from fdfo_engine.runtime.run_status import read_status


def test_a_beat_says_that_the_process_lives_and_not_that_anything_moved(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(run_status.time, "time", lambda: now[0])
    monkeypatch.setattr(run_status.time, "monotonic", lambda: now[0])
    status = run_status.RunStatus(tmp_path)
    status.update("running", epoch=2)
    for later, beats in ((1002.9, 1000.0), (1003.1, 1003.1), (1006.0, 1003.1), (1006.2, 1006.2)):
        now[0] = later
        status.beat()
        read = read_status(tmp_path)
        assert (read["heartbeat"], read["progress_at"]) == (beats, 1000.0)
    assert run_status.heartbeat(tmp_path) == 1006.2
    stream = EventStream([status])
    stream.tell(Phase(epoch=3, name="rollout", done=0, total=8, unit="images", eta_s=5.0))
    read = read_status(tmp_path)
    assert (read["phase"], read["done"], read["total"], read["unit"], read["eta_s"]) == ("rollout", 0, 8, "images", 5.0)
    now[0] = 1007.0
    stream.tell(Phase(epoch=3, name="rollout", done=4, total=8))
    assert read_status(tmp_path)["done"] == 0, "progress waits for the next beat"
    now[0] = 1010.0
    status.beat()
    read = read_status(tmp_path)
    assert (read["done"], read["progress_at"], read["heartbeat"]) == (4, 1007.0, 1010.0)


def test_events_become_what_a_frontend_reads(tmp_path):
    status = run_status.RunStatus(tmp_path)
    stream = EventStream([status])
    stream.tell(State(epoch=2, state="running", epochs=9, message="m"))
    stream.tell(Phase(epoch=2, name="update", done=1, total=2, unit="micro-batches"))
    stream.tell(Metrics(epoch=3, kind="update", values={"reward_mean": 9.0}))
    assert (status.field("epoch"), status.field("reward_mean"), status.field("phase")) == (2, None, "update")
    stream.tell(Metrics(epoch=3, kind="epoch", values={"reward_mean": 0.5, "images_per_second": 2.0, "loss": 1.0}))
    stream.tell(Checkpoint(epoch=2, name="epoch_000002"))
    read = read_status(tmp_path)
    assert (read["state"], read["epoch"], read["epochs"], read["message"]) == ("running", 3, 9, "m")
    assert (read["reward_mean"], read["images_per_second"], read["phase"]) == (0.5, 2.0, None)
    assert (read["last_checkpoint"], read["exit_code"]) == ("epoch_000002", None)
    stream.tell(Phase(epoch=3, name="rollout", done=0, total=8))
    stream.tell(State(epoch=4, state="failed", epochs=9, message="gone"))
    assert (status.field("state"), status.field("message")) == ("running", "gone"), "its end comes with its exit code"
    stream.tell(Done(epoch=4, state="failed", exit_code=5))
    read = read_status(tmp_path)
    assert (read["state"], read["exit_code"], read["phase"]) == ("failed", 5, "rollout"), "where it failed"
    stream.tell(Done(epoch=9, state="finished", exit_code=0))
    read = read_status(tmp_path)
    assert (read["state"], read["exit_code"], read["phase"], read["total"]) == ("finished", 0, None, None)


@pytest.mark.parametrize("state", ["starting", "running", "paused", "finished", "failed"])
def test_only_a_run_of_this_host_that_goes_on_can_have_died(tmp_path, state):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    goes_on = state in ("starting", "running", "paused")
    here = socket.gethostname()
    for host, pid, died in ((here, dead.pid, goes_on), ("elsewhere", dead.pid, False), (here, os.getpid(), False)):
        (tmp_path / "status.json").write_text(json.dumps({"state": state, "host": host, "pid": pid}))
        assert read_status(tmp_path)["state"] == ("died" if died else state)


def test_the_one_who_finds_it_dead_goes_on_with_its_status(tmp_path):
    assert run_status.RunStatus.taken_over(tmp_path) is None, "nothing was written"
    status = run_status.RunStatus(tmp_path)
    status.update("running", epoch=4, phase="update")
    taken = run_status.RunStatus.taken_over(tmp_path)
    assert (taken.field("epoch"), taken.field("phase")) == (4, "update")
    (tmp_path / "status.json").write_text("{half")
    assert run_status.RunStatus.taken_over(tmp_path).field("epoch") == 0
    status.update("failed", exit_code=0)
    assert run_status.RunStatus.taken_over(tmp_path) is None


@pytest.mark.parametrize(
    ("field", "taken", "refused"),
    [
        ("pid", (0, 2**31 - 1), (-1, 2**31, 1.0, "7", True)),
        ("heartbeat", (0.0, 1.5), (-0.5, "now", None)),
        ("exit_code", (None, 0, 5), ("5", 1.5)),
        ("state", ("running", ""), (None, 3)),
        ("done", (None, 3), (0.5, "3")),
        ("eta_s", (None, 0.5), ("soon",)),
    ],
)
def test_a_damaged_status_is_one_kind_of_error(tmp_path, field, taken, refused):
    for value in (*taken, *refused):
        (tmp_path / "status.json").write_text(json.dumps({"state": "failed", field: value}))
        if value in refused and (type(value), value) not in [(type(other), other) for other in taken]:
            with pytest.raises(ValueError, match=field):
                read_status(tmp_path)
        else:
            assert read_status(tmp_path)[field] == value


def test_a_heartbeat_is_a_number_or_nothing(tmp_path):
    assert run_status.heartbeat(tmp_path) is None
    for text, wanted in (
        ("{half", None),
        ("[]", None),
        ("{}", None),
        ('{"heartbeat": "1"}', None),
        ('{"heartbeat": 2.5}', 2.5),
    ):
        (tmp_path / "status.json").write_text(text)
        assert run_status.heartbeat(tmp_path) == wanted
