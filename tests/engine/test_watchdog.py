"""Two ranks, of which one does not get on: which one, and where, is told, the other ends too, and nobody is left."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from engine.launching import ROOT, environment
from engine.test_launcher import descendants, is_running, status
from tiny_sd3 import tiny_tree

from benchmarks.nursery import Nursery

TIMEOUT_S = 6


@pytest.fixture(scope="module")
def nursery():
    with Nursery(environment()) as nursery:
        yield nursery


def write_config(pipeline, folder, *, epochs=400, pairs=12):
    tree = tiny_tree(
        pipeline, folder / "run", run={"dir": str(folder / "run"), "epochs": epochs}, comm={"timeout_s": TIMEOUT_S},
        rewards=[{"name": "engine.hanging_rewards:brightness", "weight": 1.0}],
        sampling={"pairs_per_epoch": pairs, "block_pairs": 2, "steps": 8},
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def wait_for(phase, rank, folder, is_running):
    """Until `rank` is in `phase`, after an epoch; its process."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert is_running(), (folder / "log").read_text()[-3000:]
        try:
            sign = json.loads((folder / f"run/ranks/rank_{rank:04d}.json").read_text())
            if status(folder)["epoch"] >= 1 and sign["place"].startswith(phase):
                return sign["pid"]
        except (OSError, ValueError):  # not there yet, or just being written
            pass
        time.sleep(0.02)
    raise AssertionError((folder / "log").read_text()[-3000:])


def check_named(folder, rank, pid, phase, number):
    found = status(folder)
    assert (found["state"], found["exit_code"]) == ("failed", 8)
    assert f"rank {rank} (process {pid}), in {phase}, at " in found["message"]
    if number == signal.SIGSTOP:
        assert "it was stopped" in found["message"]
        assert "the same command goes on" in found["message"]


LAUNCHED = [("rollout", 1, signal.SIGSTOP), ("update", 0, signal.SIGKILL)]


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank", "number"), LAUNCHED, ids=["stopped", "rank 0 killed"])
def test_of_a_launched_run_a_lost_rank_is_named_and_nobody_is_left(tiny_sd3, tmp_path, phase, rank, number):
    config = write_config(tiny_sd3, tmp_path)
    command = [sys.executable, "-m", "fdfo_engine.cli.main", "train", "--ranks", "2", "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    pid = wait_for(phase, rank, tmp_path, lambda: process.poll() is None)
    everybody = [process.pid, *descendants(process.pid)]
    os.kill(pid, number)
    assert process.wait(timeout=TIMEOUT_S + 60) == 8, (tmp_path / "log").read_text()[-3000:]
    deadline = time.monotonic() + 30
    while any(map(is_running, everybody)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in everybody if is_running(pid)] == []
    check_named(tmp_path, rank, pid, phase, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_a_rank_that_is_stopped_or_killed_is_named_with_its_phase(tiny_sd3, tmp_path, nursery, phase, rank, number):
    ranks = nursery.start(tmp_path, write_config(tiny_sd3, tmp_path), ranks=2)
    pid = wait_for(phase, rank, tmp_path, lambda: is_running(ranks.pids[0]))
    ranks.kill(rank, number)
    codes = ranks.wait(TIMEOUT_S + 60)
    assert codes[1 - rank] == 8, ranks.log()[-3000:]
    check_named(tmp_path, rank, pid, phase, number)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("way", ["interpreter", "lock", "sleep"])
def test_a_rank_that_hangs_in_a_reward_is_named_with_its_stacks(tiny_sd3, tmp_path, nursery, way, rank):
    hang = {"HANG": way, "HANG_RANK": str(rank)}
    ranks = nursery.start(tmp_path, write_config(tiny_sd3, tmp_path), ranks=2, **hang)
    codes = ranks.wait(200)
    assert codes[1 - rank] == 8, ranks.log()[-3000:]
    found = status(tmp_path)
    assert (found["state"], found["exit_code"]) == ("failed", 8)
    assert f"rank {rank} (process {ranks.pids[rank]}), in " in found["message"]
    stacks = tmp_path / f"run/ranks/rank_000{rank}_stacks.txt"
    assert str(stacks) in found["message"]
    assert "hanging_rewards.py" in stacks.read_text()


@pytest.mark.slow
def test_a_slow_rank_that_gets_on_is_not_named(tiny_sd3, tmp_path, nursery):
    """Every block takes rank 1 almost as long as may be, and the rollout several times that."""
    slow = {"HANG": "slow", "SLOW_S": str(0.7 * TIMEOUT_S)}
    ranks = nursery.start(tmp_path, write_config(tiny_sd3, tmp_path, epochs=1), ranks=2, **slow)
    assert ranks.wait(300) == [0, 0], ranks.log()[-3000:]
    assert status(tmp_path)["state"] == "finished"
