import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_sd3 import tiny_config

from fdfo_engine.config import dump_config, resumable_keys
from fdfo_engine.runtime import run_folder, run_lock
from fdfo_engine.runtime.durable import append_line
from fdfo_engine.runtime.errors import CheckpointError, PromptError, UsageError
from fdfo_engine.runtime.event_log import EventLog, read_events
from fdfo_engine.runtime.events import Caution, EventStream
from fdfo_engine.runtime.run_folder import (
    RunFolder,
    differing_settings,
    probe_storage,
    read_log,
    runs_beside,
    stored_config,
    truncate_log,
)
from fdfo_engine.runtime.run_lock import RunLock
from fdfo_engine.runtime.run_status import read_status

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "run: {seed: 0, epochs: 3}\noptimizer: {lr: 1.0e-4, betas: [0.9, 0.999]}\n"

HOLD = """
import sys
import time
from fdfo_engine.runtime.run_folder import RunFolder
folder = RunFolder.open(sys.argv[1], sys.argv[2])
folder.status.update("running", epoch=1)
print("held", flush=True)
sys.stdin.read()
"""


def holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), CONFIG],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def kill(process):
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_open_writes_the_settings_once(tmp_path):
    path = tmp_path / "runs" / "x"
    with RunFolder.open(path, CONFIG):
        assert stored_config(path) == CONFIG
        assert sorted(p.name for p in path.iterdir()) == ["config.yaml", "environment.json", "run.lock"]
    RunFolder.open(path, CONFIG.replace("{seed: 0, epochs: 3}", "{epochs: 3, seed: 0}")).close()
    assert stored_config(path) == CONFIG


def test_other_settings_are_refused_by_key(tmp_path):
    RunFolder.open(tmp_path, CONFIG).close()
    other = CONFIG.replace("1.0e-4", "3.0e-4").replace("seed: 0", "seed: 7")
    with pytest.raises(UsageError) as caught:
        RunFolder.open(tmp_path, other, may_change=["run.epochs"])
    assert "optimizer.lr: 0.0001 there, 0.0003 given" in str(caught.value)
    assert "run.seed: 0 there, 7 given" in str(caught.value)
    assert stored_config(tmp_path) == CONFIG
    RunFolder.open(tmp_path, CONFIG).close()


def test_some_settings_may_change(tmp_path, capsys):
    RunFolder.open(tmp_path, CONFIG).close()
    longer = CONFIG.replace("epochs: 3", "epochs: 30")
    RunFolder.open(tmp_path, longer, may_change=["run.epochs"]).close()
    assert stored_config(tmp_path) == longer
    assert "run.epochs: 3 there, 30 given" in capsys.readouterr().out
    with RunFolder.open(tmp_path, CONFIG, may_change=["run"]):
        pass


def test_differing_settings_tell_absent_from_null():
    found = differing_settings("a: {b: null, c: 1}", "a: {c: 1, d: 2}")
    assert found == {"a.b": "null there, absent given", "a.d": "absent there, 2 given"}


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints"])
def test_a_run_without_settings_is_not_started_over(tmp_path, trace):
    (tmp_path / trace).mkdir()
    with pytest.raises(UsageError, match=f"{trace} but no config.yaml"):
        RunFolder.open(tmp_path, CONFIG)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        RunFolder.open(tmp_path / "x", CONFIG)
    with pytest.raises(CheckpointError, match="cannot write"):
        RunFolder.open(tmp_path / "x" / "y", CONFIG)


def test_second_run_is_refused_and_a_dead_ones_lock_taken_over(tmp_path, capsys):
    first = holder(tmp_path)
    with pytest.raises(UsageError, match=rf"in use by pid {first.pid} on .*, started 20"):
        RunFolder.open(tmp_path, CONFIG)
    assert read_status(tmp_path)["state"] == "running"
    kill(first)
    assert read_status(tmp_path)["state"] == "died"
    with RunFolder.open(tmp_path, CONFIG):
        assert f"its last process, pid {first.pid} on" in capsys.readouterr().out
    RunFolder.open(tmp_path, CONFIG).close()
    assert "took over" not in capsys.readouterr().out


def test_lock_holds_within_one_process_and_is_released_on_refusal(tmp_path):
    with RunFolder.open(tmp_path, CONFIG), pytest.raises(UsageError, match=f"pid {os.getpid()}"):
        RunFolder.open(tmp_path, CONFIG)
    with pytest.raises(UsageError, match="other settings"):
        RunFolder.open(tmp_path, "run: {seed: 1}")
    RunFolder.open(tmp_path, CONFIG).close()


def test_lock_of_another_host_is_left_alone(tmp_path):
    lock = {"pid": 1, "host": "elsewhere.example", "started": "2030-01-01"}
    (tmp_path / "run.lock").write_text(json.dumps(lock))
    with pytest.raises(UsageError, match=r"pid 1 on elsewhere.example.*if that run is over, delete .*run\.lock"):
        RunFolder.open(tmp_path, CONFIG)


def test_half_written_lock_is_taken(tmp_path):
    (tmp_path / "run.lock").write_text('{"pid": 1, "ho')
    RunFolder.open(tmp_path, CONFIG).close()


def test_storage_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*: Read-only file system"):
        probe_storage(tmp_path)
    with pytest.raises(CheckpointError, match="Read-only"):
        RunFolder.open(tmp_path / "x", CONFIG)


def test_truncation_keeps_whole_lines_up_to_the_checkpoint(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"epoch": 1, "a": "\xc3\xa9"}\n', b'{"epoch": 2}\n', b"{broken\n", b"3\n", b'{"epoch": 3}\n', b'{"epo']
    path.write_bytes(b"".join(lines))
    truncate_log(path, 2)
    assert path.read_bytes() == lines[0] + lines[1]
    assert capsys.readouterr().err.count("dropped a damaged line") == 2
    truncate_log(path, 2)
    truncate_log(tmp_path / "absent.jsonl", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_half_line_of_a_kept_epoch_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 1}\n{"epoch": 2}')
    assert [r["epoch"] for r in read_log(path)] == [1]
    truncate_log(path, 9)
    assert path.read_bytes() == b'{"epoch": 1}\n'
    assert read_log(tmp_path / "absent") == []


def test_truncate_logs_covers_both(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            (tmp_path / name).write_text('{"epoch": 0}\n{"epoch": 5}\n')
        folder.truncate_logs(4)
        assert [read_log(tmp_path / n) for n in ("metrics.jsonl", "evaluations.jsonl")] == [[{"epoch": 0}]] * 2


def test_status_is_replaced_whole(tmp_path):
    assert read_status(tmp_path) is None
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.status.update("running", epoch=2, epochs=9, last_checkpoint="epoch_000002")
        folder.status.update("failed", exit_code=5, message="reward 'x' is gone")
        status = read_status(tmp_path)
    expected = {"state": "failed", "exit_code": 5, "message": "reward 'x' is gone", "epoch": 2, "epochs": 9}
    assert expected.items() <= status.items()
    assert status["pid"] == os.getpid()
    assert not list(tmp_path.glob(".tmp*"))
    with pytest.raises(AssertionError, match="epok"):
        folder.status.update(epok=1)


def test_heartbeat_is_renewed_when_old(tmp_path, monkeypatch):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.status.update("running")
        first = read_status(tmp_path)["heartbeat"]
        folder.status.beat()
        assert read_status(tmp_path)["heartbeat"] == first
        monkeypatch.setattr("fdfo_engine.runtime.run_status.HEARTBEAT_S", 0.0)
        folder.status.beat()
        assert read_status(tmp_path)["heartbeat"] > first


HTTP = {"name": "http", "weight": 1.0, "url": "http://a:1/score", "batch_size": 4}
VLM = {"name": "vlm_server", "weight": 0.5, "url": "http://a:2/v1", "model": "judge"}
URL = {"name": "http://a:1/score", "weight": 1.0}
OWN = {"name": "brightness", "weight": 1.0}


def reopened(tiny_sd3, folder, before, after):
    """What `RunFolder.open` says of a run made with `before` and given `after`: each a list of rewards and metrics."""
    for rewards, metrics in (before, after):
        config = tiny_config(tiny_sd3, folder, rewards=rewards, evaluation={"metrics": metrics})
        RunFolder.open(folder, dump_config(config), may_change=resumable_keys(config)).close()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (HTTP, HTTP | {"url": "http://b:9/score"}),
        (HTTP, HTTP | {"timeout_s": 5.0, "give_up_after_s": 30.0, "concurrency": 2}),
        (HTTP | {"timeout_s": 5.0}, HTTP),
        (VLM, VLM | {"url": "https://b/v1", "concurrency": 64}),
        (VLM, VLM | {"ask_first": False}),
        (URL, URL | {"name": "http://b:9/score"}),
        (URL, URL | {"timeout_s": 5.0}),
        (OWN, OWN | {"allow_download": False}),
    ],
)
def test_a_run_goes_on_with_its_server_elsewhere(tiny_sd3, tmp_path, before, after, capsys):
    reopened(tiny_sd3, tmp_path / "run", ([OWN, before], []), ([OWN, after], []))
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert stored["rewards"][1] == {"normalize": "none", "kill_after_s": None} | after
    reopened(tiny_sd3, tmp_path / "metric", ([OWN], ["shapes", before]), ([OWN], ["shapes", after]))


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ([HTTP], [HTTP | {"weight": 2.0}], "rewards.0.weight"),
        ([HTTP], [HTTP | {"batch_size": 8}], "rewards.0.batch_size"),
        ([HTTP], [HTTP | {"normalize": "std"}], "rewards.0.normalize"),
        ([VLM], [VLM | {"model": "other"}], "rewards.0.model"),
        ([VLM], [VLM | {"question": "Is it {prompt}?"}], "rewards.0.question"),
        ([URL], [VLM], "rewards.0.name"),
        ([OWN], [URL], "rewards.0.name"),
        ([URL], [OWN], "rewards.0.name"),
        ([OWN, HTTP], [HTTP, OWN], "rewards.0.name"),
        ([HTTP], [HTTP, OWN], "rewards.1.name"),
        ([OWN | {"url": "http://a/"}], [OWN | {"url": "http://b/"}], "rewards.0.url"),
    ],
)
def test_what_is_scored_may_not_change(tiny_sd3, tmp_path, before, after, key):
    with pytest.raises(UsageError, match=rf"made with other settings(.|\n)*{re.escape(key)}: "):
        reopened(tiny_sd3, tmp_path / "run", (before, []), (after, []))


def test_a_url_as_a_name_is_the_server_at_that_url(tiny_sd3, tmp_path, capsys):
    reopened(tiny_sd3, tmp_path, ([URL], []), ([{"name": "http", "weight": 1.0, "url": URL["name"]}], []))
    assert "settings changed" not in capsys.readouterr().out


def test_settings_of_an_earlier_version_lack_keys_and_are_the_same(tiny_sd3, tmp_path):
    given = dump_config(tiny_config(tiny_sd3, tmp_path / "run"))
    tree = yaml.safe_load(given)
    del tree["model"]["quantize"], tree["zero"]["offload_optimizer"]
    assert differing_settings(yaml.safe_dump(tree), given) == {}
    tree["model"]["max_sequence_length"] = 8
    assert differing_settings(yaml.safe_dump(tree), given) == {"model.max_sequence_length": "8 there, 16 given"}


def test_another_prompt_list_is_refused_unless_it_is_allowed(tmp_path, capsys):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.require_prompts("a" * 64)
        folder.require_prompts("a" * 64)
        with pytest.raises(PromptError, match="--allow-prompt-change"):
            folder.require_prompts("b" * 64)
        assert capsys.readouterr().err == ""
        folder.require_prompts("b" * 64, may_change=True)
        assert "goes on with other prompts" in capsys.readouterr().err
        folder.require_prompts("b" * 64)


def left_by_another_host(folder, monkeypatch):
    """A run whose lock is free and whose status says that it runs; heartbeats are looked for over a short time."""
    RunFolder.open(folder, CONFIG).close()
    lock = {"pid": 1, "host": "elsewhere.example", "started": "2030-01-01"}
    (folder / "run.lock").write_text(json.dumps(lock))
    (folder / "status.json").write_text(json.dumps({"state": "running", "heartbeat": 1.5}))
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.3)


def test_a_run_killed_under_another_host_name_is_taken_over(tmp_path, monkeypatch, capsys):
    """As a container that is started again, under a name of its own."""
    left_by_another_host(tmp_path, monkeypatch)
    RunFolder.open(tmp_path, CONFIG).close()
    printed = capsys.readouterr().out
    assert "pid 1 on elsewhere.example, started 2030-01-01: looking for" in printed
    assert "took over" in printed


def test_a_run_on_another_host_that_still_beats_is_left_alone(tmp_path, monkeypatch):
    left_by_another_host(tmp_path, monkeypatch)
    beat = json.dumps({"state": "running", "heartbeat": 4.5})
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "status.json").write_text(beat))
    with pytest.raises(UsageError, match=r"was in use by pid 1 on elsewhere\.example"):
        RunFolder.open(tmp_path, CONFIG)


def test_leftovers_of_a_killed_writer_go_and_those_of_a_living_one_stay(tmp_path):
    RunFolder.open(tmp_path, CONFIG).close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".tmp-status.json-{dead.pid}", f".tmp-config.yaml-{dead.pid}"]
    stays = [f".tmp-serve.json-{os.getpid()}", ".tmp-somebody's", f"tmp-{dead.pid}"]
    for name in gone + stays:
        (tmp_path / name).write_text("half")
    RunFolder.open(tmp_path, CONFIG).close()
    assert [name for name in gone + stays if (tmp_path / name).exists()] == stays


def test_where_a_filesystem_has_no_locks_the_file_says_who_holds_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "_try_flock", lambda descriptor: None)
    holder = {"pid": os.getppid(), "host": socket.gethostname(), "started": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    with pytest.raises(UsageError, match=f"in use by pid {os.getppid()}"):
        run_lock.RunLock(tmp_path).take()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / "run.lock").write_text(json.dumps(holder | {"pid": child.pid}))
    run_lock.RunLock(tmp_path).take()
    assert f"its last process, pid {child.pid} on" in capsys.readouterr().out
    (tmp_path / "free").mkdir()
    run_lock.RunLock(tmp_path / "free").take()


def test_the_events_end_where_the_metrics_do(tmp_path):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        log = EventLog(tmp_path)
        stream = EventStream([log])
        for epoch in (0, 1, 2, 3):
            stream.tell(Caution(epoch=epoch, message=""))
            append_line(tmp_path / "metrics.jsonl", {"epoch": epoch})
        log.close()
        folder.truncate_logs(2)
    assert [event.data.epoch for event in read_events(tmp_path)] == [0, 1, 2]
    assert [line["epoch"] for line in read_log(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_section_that_may_change_is_not_one_whose_name_begins_alike(tmp_path):
    assert differing_settings("{log: {a: 1}, logs: {a: 1}}", "{log: {a: 2}, logs: {a: 2}}", under=("log",)) == {
        "log.a": "1 there, 2 given"
    }
    RunFolder.open(tmp_path, "run: {epochs: 1, epochs_more: 1}").close()
    with pytest.raises(UsageError, match=r"run\.epochs_more: 1 there, 2 given"):
        RunFolder.open(tmp_path, "run: {epochs: 1, epochs_more: 2}", may_change=["run.epochs"])


def test_equal_prompts_are_no_change_even_where_one_is_allowed(tmp_path, capsys):
    with RunFolder.open(tmp_path, CONFIG) as folder:
        folder.require_prompts("a" * 64)
        folder.require_prompts("a" * 64, may_change=True)
    assert capsys.readouterr().err == ""


def test_the_storage_is_tried_before_anything_is_written_and_the_lock_taken_before_that(tmp_path, monkeypatch):
    def refuses(folder):
        with pytest.raises(UsageError, match=f"in use by pid {os.getpid()}"):
            RunLock(tmp_path).take()
        raise CheckpointError("no")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "probe_storage", refuses)
        with pytest.raises(CheckpointError, match="no"):
            RunFolder.open(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    RunFolder.open(tmp_path, CONFIG).close()
    with RunFolder.open(tmp_path, CONFIG) as folder, pytest.raises(CheckpointError, match="no space left"):
        folder.require_room(1 << 60)


def test_runs_beside_are_named_up_to_twelve(tmp_path):
    for number in range(14):
        RunFolder.open(tmp_path / f"run_{number:02d}", CONFIG).close()
    found = runs_beside(tmp_path / "nowhere")
    assert found == f"; runs in {tmp_path}: {', '.join(f'run_{number:02d}' for number in range(12))} and 2 more"
    assert runs_beside(tmp_path / "run_00" / "below") == ""
    shutil.rmtree(tmp_path / "run_13")
    shutil.rmtree(tmp_path / "run_12")
    assert runs_beside(tmp_path / "nowhere").endswith("run_11")
