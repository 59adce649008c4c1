import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fdfo_engine.config import Config
from fdfo_engine.runtime import distributed, events, peers, pulse, watch
from fdfo_engine.runtime.errors import DistributedError
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.progress import Progress
from fdfo_engine.runtime.rank_files import RankFile, Sign, read_sign, stacks_path
from fdfo_engine.runtime.run_lock import RunLock
from fdfo_engine.runtime.run_status import RunStatus, read_status
from fdfo_engine.runtime.survivor import speak_for_rank_0
from fdfo_engine.runtime.watch import Stillness, Watch, waits_for_others


@pytest.fixture(autouse=True)
def nobody_works():
    pulse.forget()
    yield
    pulse.forget()
    peers.meet_in(None)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_sign_is_read_as_it_was_written(tmp_path):
    file = RankFile(tmp_path, 3)
    long = Sign(77, 1, "rollout " + "x" * 5000, 1.5, True, "stück " * 500)
    file.write(long)
    found = read_sign(tmp_path, 3, 77)
    assert (found.pid, found.beat, found.still_s, found.waits, found.has_left) == (77, 1, 1.5, True, False)
    assert long.place.startswith(found.place)
    assert long.stuck.startswith(found.stuck)
    file.write(Sign(77, 2, "update, at 3 of 8 micro-batches", has_left=True))  # a shorter one leaves nothing of it
    assert read_sign(tmp_path, 3, 77) == Sign(77, 2, "update, at 3 of 8 micro-batches", has_left=True)
    assert read_sign(tmp_path, 3, 78) is None, "of a process of an earlier run"
    assert read_sign(tmp_path, 4, 77) is None
    file.close()
    assert not stacks_path(tmp_path, 3).exists(), "a file of stacks without any"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b'{"pid": 1}', b'{"pid": 1, "beat": 1, "place": "", "odd": 1}', b"\xff"]
)
def test_a_damaged_sign_is_none(tmp_path, data):
    RankFile(tmp_path, 0).close()
    (tmp_path / "ranks/rank_0000.json").write_bytes(data)
    assert read_sign(tmp_path, 0, 1) is None


def test_stillness_counts_only_while_the_process_runs(clock):
    still = Stillness(most_s=1.0)
    assert still.look("a") == 0.0
    for _ in range(3):
        clock[0] += 0.5
        still.look("a")
    assert still.seconds == 1.5
    clock[0] += 1000.0  # the whole machine slept, or all were stopped by Ctrl-Z
    assert still.look("a") == 2.5
    clock[0] += 0.5
    assert still.look("b") == 0.0


def test_parts_are_counted_by_thread():
    pulse.enter_phase(lambda: "rollout, at 1 of 2 images")
    assert pulse.place() == "rollout, at 1 of 2 images"
    with pulse.work("scoring"), ThreadPoolExecutor(1) as helper:
        own = pulse.works()[threading.get_ident()]
        assert own.name == "scoring"
        before = own.parts
        pulse.got_on()
        helper.submit(pulse.got_on, 50.0).result()  # of a thread that nobody watches
        assert own.parts == before + 2
        assert 49 < own.may_last_until - time.monotonic() <= 50
        pulse.got_on()
        assert own.may_last_until == 0.0
    assert pulse.works() == {}


def test_all_that_moves_a_phase_counts(no_group, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    progress = Progress()
    with progress.phase("loading", total=1, unit="models"):
        assert pulse.works() == {}, "it has no parts"
    with progress.phase("rollout", total=4) as phase:
        (work,) = pulse.works().values()
        seen = [work.parts]
        for move in (lambda: phase.reach(1), lambda: phase.count(1), lambda: phase.advance(1)):
            move()
            seen.append(work.parts)
        assert seen == sorted(set(seen))
        assert pulse.place() == "rollout, at 2 of 4 images"
        distributed.any_rank(False)
        assert work.parts > seen[-1]


def frames_of(action):
    """The innermost frame of a thread that is within `action`, which sleeps."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    time.sleep(0.1)
    frame = sys._current_frames()[thread.ident]
    thread.join()
    return frame


def of_file(path, body):
    space = {"time": time}
    exec(compile(f"def wait(inner=lambda: time.sleep(0.3)):\n    {body}", path, "exec"), space)
    return space["wait"]


def test_who_waits_in_a_collective_is_told_from_who_waits_in_itself():
    collective = of_file("/lib/torch/distributed/distributed_c10d.py", "time.sleep(0.3)")
    autograd = of_file("/lib/torch/autograd/graph.py", "inner()")
    module = of_file("/lib/torch/nn/modules/module.py", "inner()")
    reward = of_file("/home/me/reward.py", "inner()")
    assert waits_for_others(frames_of(collective))
    assert waits_for_others(frames_of(lambda: reward(collective)))
    assert waits_for_others(frames_of(lambda: collective()))
    assert not waits_for_others(frames_of(reward))
    assert not waits_for_others(frames_of(lambda: module(lambda: time.sleep(0.3))))
    assert not waits_for_others(frames_of(lambda: autograd(lambda: module(reward))))


def watching(tmp_path, monkeypatch, timeout_s=0.5):
    """A watch of one rank, and what it says."""
    said = []
    monkeypatch.setattr(watch, "warn", said.append)
    return Watch(tmp_path, timeout_s, lambda error: None), said


def test_somebody_elses_process_is_not_ended_but_told(tmp_path, monkeypatch):
    watcher, said = watching(tmp_path, monkeypatch)
    with watcher:
        pulse.enter_phase(lambda: "update, at 3 of 8 micro-batches")
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
    (line,) = said
    assert line.startswith(
        f"rank 0 (process {os.getpid()}), in update, at 3 of 8 micro-batches: the engine has not got on"
    )
    assert f"{Path(__file__).name}:" in line
    assert list(tmp_path.iterdir()) == []


def test_who_gets_on_or_has_a_limit_of_his_own_is_left_alone(tmp_path, monkeypatch):
    watcher, said = watching(tmp_path, monkeypatch)
    with watcher:
        pulse.enter_phase(lambda: "rollout")
        for _ in range(15):
            time.sleep(0.1)
            pulse.got_on()
        pulse.got_on(limit_s=60.0)
        time.sleep(1.2)
    assert said == []


def test_before_the_first_phase_nobody_is_watched(tmp_path, monkeypatch):
    watcher, said = watching(tmp_path, monkeypatch)
    with watcher:
        time.sleep(1.2)  # a model loads
    assert said == []


GIVES_UP = """
import sys, time
from pathlib import Path
from fdfo_engine.runtime import process, pulse
from fdfo_engine.runtime.watch import Watch
process.claim_process()
with Watch(sys.argv[1], 0.5, lambda error: Path(sys.argv[1], "told").write_text(str(error))):
    pulse.enter_phase(lambda: "reward, at 1 of 6 blocks")
    time.sleep(1000)
"""


def test_our_own_process_is_ended_with_exit_code_8(tmp_path):
    ended = subprocess.run([sys.executable, "-c", GIVES_UP, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 8, ended.stderr
    assert "error: rank 0 (process " in ended.stderr
    told = (tmp_path / "told").read_text()
    assert "in reward, at 1 of 6 blocks: the engine has not got on for" in told
    assert told.endswith("the same command goes on from the last checkpoint")


def run_of_another(folder, state="running"):
    """The folder of a run whose process left it in the middle."""
    status = RunStatus(folder)
    stream = events.EventStream([status, EventLog(folder)])
    stream.tell(events.State(epoch=0, state="running", epochs=9))
    stream.tell(events.Checkpoint(epoch=4, name="epoch_000004"))
    if state == "failed":
        status.update("failed", exit_code=5, message="the reward")


def test_a_survivor_tells_how_the_run_ended(tmp_path):
    run_of_another(tmp_path)
    speak_for_rank_0(tmp_path, DistributedError("rank 0 is gone"))
    found = read_status(tmp_path)
    assert (found["state"], found["exit_code"], found["message"]) == ("failed", 8, "rank 0 is gone")
    assert (found["epoch"], found["epochs"], found["last_checkpoint"]) == (4, 9, "epoch_000004")
    kept = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["seq"] for event in kept] == [1, 2, 3, 4, 5]
    assert [event["type"] for event in kept[2:]] == ["error", "state", "done"]
    speak_for_rank_0(tmp_path, DistributedError("another survivor"))
    assert read_status(tmp_path)["message"] == "rank 0 is gone"


def test_a_survivor_is_silent_where_rank_0_spoke_or_lives(tmp_path):
    run_of_another(tmp_path, "failed")
    speak_for_rank_0(tmp_path, DistributedError("lost"))
    assert read_status(tmp_path)["message"] == "the reward"
    living = tmp_path / "living"
    living.mkdir()
    run_of_another(living)
    lock = RunLock(living)
    lock.take()
    speak_for_rank_0(living, DistributedError("lost"))
    assert read_status(living)["state"] == "running"
    lock.release()


@pytest.mark.parametrize("value", [0, 4.9, -1, "soon", None, float("nan")])
def test_the_timeout_has_bounds(value):
    with pytest.raises(ValueError, match="timeout_s"):
        Config.model_fields["comm"].annotation.model_validate({"timeout_s": value})
