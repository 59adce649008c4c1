import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fdfo_engine.runtime import errors
from fdfo_engine.runtime import stop as stop_module
from fdfo_engine.runtime.console import visible
from fdfo_engine.runtime.environment import describe_environment, package_version
from fdfo_engine.runtime.progress import Progress
from fdfo_engine.runtime.stop import StopRequest
from fdfo_engine.runtime.timing import PhaseTimer

ROOT = Path(__file__).resolve().parents[2]
CODES = {
    "UsageError": 2, "EnvironmentProblem": 3, "PromptError": 4, "RewardError": 5, "NumericsError": 6,
    "CheckpointError": 7, "DistributedError": 8, "Stopped": 75,
}  # fmt: skip


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_a_users_error_is_one_block_without_traceback(name, code, capsys, monkeypatch):
    monkeypatch.delenv("FDFO_DEBUG", raising=False)
    assert errors.report_and_exit_code(getattr(errors, name)("what\nand where")) == code
    expected = "stopped" if code == 75 else "error"
    assert capsys.readouterr().err == f"{expected}: what\nand where\n"


def test_a_bug_has_its_traceback(capsys):
    with pytest.raises(KeyError) as caught:
        raise KeyError("x")
    assert errors.report_and_exit_code(caught.value) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "error: KeyError: 'x'\nthis is a bug" in printed


def test_debug_shows_every_traceback(capsys, monkeypatch):
    monkeypatch.setenv("FDFO_DEBUG", "1")
    errors.report_and_exit_code(errors.RewardError("gone"))
    assert "RewardError: gone" in capsys.readouterr().err


def test_only_rank_0_reports(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert errors.report_and_exit_code(errors.PromptError("x")) == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 3, "update.micro_batch"),
        (MemoryError(), 3, "out of memory"),
        (OSError(28, "No space left on device"), 7, "No space left"),
        (OSError(5, "Input/output error", "run/metrics.jsonl"), 7, "run/metrics.jsonl: Input/output error"),
        (OSError(24, "Too many open files", "x"), 7, "x: Too many open files"),
        (OSError(30, "Read-only file system"), 7, "Read-only"),
        (OSError(116, "Stale file handle"), 7, "Stale"),
        (KeyboardInterrupt(), 75, "interrupted"),
    ],
)
def test_known_foreign_errors(error, code, text):
    assert errors.exit_code(error) == code
    assert text in errors.error_message(error)


PEER = """
import sys, torch.distributed as dist, torch
from fdfo_engine.runtime.errors import exit_code, error_message
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
dist.all_reduce(torch.ones(1))
if sys.argv[2] == "1":
    import os; os._exit(0)
try:
    dist.all_reduce(torch.ones(1 << 20))
except RuntimeError as error:
    print(exit_code(error), error_message(error), flush=True)
import os; os._exit(0)
"""


def test_a_collective_that_a_dead_rank_broke_is_no_bug(tmp_path):
    """Whoever started it: gloo's own error, as DeepSpeed's collectives raise it too."""
    place = f"file://{tmp_path / 'store'}"
    ranks = [
        subprocess.Popen([sys.executable, "-c", PEER, place, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = ranks[0].communicate(timeout=120)[0]
    ranks[1].communicate(timeout=120)
    assert told.startswith("8 another rank is gone")


def test_an_error_of_the_config_is_reported_by_its_exit_code(capsys):
    class ConfigError(Exception):
        exit_code = 2

    assert errors.report_and_exit_code(ConfigError("configs/x.yaml:3 lrr")) == 2
    assert capsys.readouterr().err == "error: configs/x.yaml:3 lrr\n"


def test_control_characters_are_shown():
    assert visible("a\x1b[31m\nb\u202e é😀") == "a\\x1b[31m\\nb\\u202e é😀"
    assert visible("\ud800") == "\\ud800"


def test_signals_only_set_a_flag():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.poll()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.poll()
        assert stop.requested
        assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("signals", "eta_s", "finishes"),
    [
        ([signal.SIGINT], 1000.0, True),  # a person can press it again
        ([signal.SIGINT], None, True),
        ([signal.SIGTERM], 1000.0, False),  # SIGKILL follows
        ([signal.SIGTERM], None, False),
        ([signal.SIGTERM], 5.0, True),
        ([signal.SIGTERM], 20.0, True),
        ([signal.SIGTERM], 20.1, False),
        ([signal.SIGINT, signal.SIGTERM], 1000.0, False),  # of a launcher, to which Ctrl-C was passed on
        ([signal.SIGHUP], 1000.0, False),
    ],
    ids=str,
)
def test_an_update_is_finished_if_whoever_asks_can_wait(signals, eta_s, finishes):
    with StopRequest() as stop:
        for number in signals:
            os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.lets_finish(eta_s) == finishes
        stop.is_urgent = True
        assert not stop.lets_finish(eta_s)


def test_while_a_model_loads_a_signal_leaves_at_once():
    with StopRequest(leaves_at_once=True) as stop:
        with pytest.raises(errors.Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        stop.begin()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_ctrl_c_hurries_once_it_is_no_echo_of_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now[0])
    request = StopRequest()
    for later, urgent in ((0.0, False), (0.9, False), (1.0, True)):
        now[0] = 100.0 + later
        if urgent:
            with pytest.raises(KeyboardInterrupt):
                request._note(signal.SIGINT, None)
        else:
            request._note(signal.SIGINT, None)
        assert request.is_urgent == urgent
        assert request.is_patient, "a person, who kills nobody"
    request.begin()
    request._note(signal.SIGINT, None)
    assert not request.lets_finish(0.0)


def test_what_took_longer_than_a_stop_may_wait_is_remembered():
    stopping = stop_module.Stopping(Progress(), StopRequest())
    for seconds, late in ((20.0, False), (20.1, True), (1.0, True)):
        stopping.took(seconds)
        assert stopping.comes_late == late


ORPHAN = """
import os, sys, time
from fdfo_engine.runtime.progress import Progress
from fdfo_engine.runtime.stop import StopRequest
if os.fork():
    time.sleep(0.3)
    os._exit(0)
stop = StopRequest()
deadline = time.monotonic() + 20
while not stop.poll() and time.monotonic() < deadline:
    time.sleep(0.02)
open(sys.argv[1], "w").write(str(stop.reason))
"""


def test_death_of_the_parent_is_a_request(tmp_path):
    note = tmp_path / "note"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ORPHAN, str(note)], env=environment, check=True)
    deadline = time.monotonic() + 20
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert note.read_text().startswith("the parent process ")


def test_phases_add_up(device):
    timer = PhaseTimer(device)
    for _ in range(2):
        with timer.phase("rollout"):
            time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), timer.phase("update"):
        _ = 1 / 0
    taken = timer.take()
    assert list(taken) == ["seconds_rollout", "seconds_update", "seconds_total"]
    assert 0.02 <= taken["seconds_rollout"] <= taken["seconds_total"]
    assert list(timer.take()) == ["seconds_total"]


def test_environment_names_what_is_installed():
    found = describe_environment()
    assert found["packages"]["torch"] == package_version("torch")
    assert found["cpu"]["cores"] >= 1
    assert package_version("no-such-distribution-here") is None
