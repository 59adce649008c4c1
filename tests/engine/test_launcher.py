"""The main job under each launcher, and what a stop signal does to all of its processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from engine.launching import ROOT, TRAIN, environment, launch, launcher
from safetensors.torch import load_file
from tiny_sd3 import tiny_tree

REWARD = [{"name": "engine.pixel_rewards:left_bright", "weight": 1.0}]


def write_config(pipeline, folder, **run):
    tree = tiny_tree(pipeline, folder / "run", run={"dir": str(folder / "run"), "seed": 5, **run}, rewards=REWARD)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def metrics(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def status(folder):
    return json.loads((folder / "run/status.json").read_text())


def weights(folder, epoch):
    return load_file(folder / f"run/checkpoints/epoch_{epoch:06d}/weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["deepspeed", "torchrun"])
def test_two_ranks_run_as_one(tiny_sd3, tmp_path, by):
    folders = {}
    for name, starter, ranks in (("one", "python", 1), ("two", by, 2)):
        folders[name] = tmp_path / name
        done = launch(TRAIN, "--config", write_config(tiny_sd3, folders[name], epochs=2), by=starter, ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert status(folders[name])["state"] == "finished"
    one, two = (metrics(folder) for folder in folders.values())
    assert [row["epoch"] for row in two] == [1, 2]
    assert two[0]["reward_mean"] == pytest.approx(
        one[0]["reward_mean"], rel=1e-12
    )  # from equal weights: the same images
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    assert two[1]["reward_mean"] == pytest.approx(one[1]["reward_mean"], rel=1e-4)


def group_is_empty(leader):
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stop_signal_saves_and_the_same_command_ends_as_if_there_had_been_none(tiny_sd3, tmp_path, number):
    config = write_config(tiny_sd3, tmp_path / "stopped", epochs=40)
    command = [sys.executable, "-m", "fdfo_engine.cli.main", "train", "--ranks", "2", "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    log_file = tmp_path / "stopped/run/metrics.jsonl"
    while time.monotonic() < deadline and not (log_file.exists() and log_file.read_text().count("\n") >= 3):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=120) == 75, (tmp_path / "log").read_text()[-3000:]
    assert group_is_empty(process.pid)
    found = status(tmp_path / "stopped")
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    stopped_at = found["epoch"]
    assert 3 <= stopped_at < 40

    ends = stopped_at + 2
    for folder, overrides in ((tmp_path / "stopped", [f"run.epochs={ends}"]), (tmp_path / "whole", [])):
        config = write_config(tiny_sd3, folder, epochs=40 if overrides else ends)
        done = launch(TRAIN, "--config", config, *overrides, by="deepspeed", ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
    whole, again = (weights(tmp_path / name, ends) for name in ("whole", "stopped"))
    assert all(whole[name].equal(again[name]) for name in whole)
    assert [row["epoch"] for row in metrics(tmp_path / "stopped")] == list(range(1, ends + 1))


def descendants(pid):
    """Every process below `pid`, as long as their parents live."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    children = {}
    for child, parent in zip(map(int, found[::2]), map(int, found[1::2]), strict=True):
        children.setdefault(parent, []).append(child)
    below, waiting = [], [pid]
    while waiting:
        waiting += (more := children.get(waiting.pop(), []))
        below += more
    return below


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def hears_interrupts():
    """As a command of a terminal: one in the background of a script does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


ENDS = [
    ("deepspeed", signal.SIGTERM), ("deepspeed", signal.SIGKILL), ("deepspeed", signal.SIGINT), ("fdfo", signal.SIGHUP),
    ("fdfo", signal.SIGKILL),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("by", "number"), ENDS, ids=[f"{by}-{number.name}" for by, number in ENDS])
def test_whoever_started_a_run_ends_it_committed_and_leaves_nobody(tiny_sd3, tmp_path, by, number):
    """With a checkpoint every hundred epochs: what is on disk in the end was saved because of the stop."""
    config = write_config(tiny_sd3, tmp_path / "left", epochs=4000)
    fdfo = [sys.executable, "-m", "fdfo_engine.cli.main", "train", "--ranks", "2", "--config", str(config)]
    command = fdfo if by == "fdfo" else [*launcher("deepspeed", 2), str(TRAIN), "--config", str(config)]
    process = subprocess.Popen(
        [*command, "checkpoint.every=1000"], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=hears_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    log = tmp_path / "left/run/metrics.jsonl"
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.1)
    assert log.read_text().count("\n") >= 2
    everybody = [process.pid, *descendants(process.pid)]
    assert len(everybody) >= 4
    process.send_signal(number)
    process.wait(timeout=60)
    ends = time.monotonic() + 60  # 25 s on an idle machine
    while time.monotonic() < ends and any(map(is_running, everybody)):
        time.sleep(0.1)
    assert [pid for pid in everybody if is_running(pid)] == []
    found = status(tmp_path / "left")
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    assert found["last_checkpoint"] == f"epoch_{found['epoch']:06d}"
    assert weights(tmp_path / "left", found["epoch"])


@pytest.mark.slow
def test_a_launcher_that_dies_while_ranks_import_leaves_nobody(tiny_sd3, tmp_path):
    config = write_config(tiny_sd3, tmp_path / "early", epochs=4000)
    process = subprocess.Popen(
        [*launcher("deepspeed", 2), str(TRAIN), "--config", str(config)], env=environment(), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and len(descendants(process.pid)) < 3:
        time.sleep(0.02)
    time.sleep(0.5)  # they are there, and import
    everybody = descendants(process.pid)
    assert len(everybody) == 3
    process.kill()
    process.wait()
    while time.monotonic() < deadline and any(map(is_running, everybody)):
        time.sleep(0.1)
    assert [pid for pid in everybody if is_running(pid)] == []


@pytest.mark.slow
def test_ranks_of_a_killed_launcher_stop_and_save(tiny_sd3, tmp_path):
    """`deepspeed` killed outright leaves its ranks behind: they notice that their parent is gone."""
    config = write_config(tiny_sd3, tmp_path / "orphaned", epochs=400)
    command = [sys.executable, "-m", "fdfo_engine.cli.main", "train", "--ranks", "2", "--config", str(config)]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "orphaned/run/metrics.jsonl").exists():
        time.sleep(0.1)
    rank = status(tmp_path / "orphaned")["pid"]
    parent = int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(rank)], text=True))
    os.kill(parent, signal.SIGKILL)
    while time.monotonic() < deadline and status(tmp_path / "orphaned")["state"] == "running":
        time.sleep(0.1)
    found = status(tmp_path / "orphaned")
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    assert "parent process" in found["message"]
    assert found["last_checkpoint"] == f"epoch_{found['epoch']:06d}"
    process.wait(timeout=60)
