"""What the verbs say and write."""

import json
import socket
import time

import pytest

from fdfo_engine.cli import doctor
from fdfo_engine.cli.main import main
from fdfo_engine.cli.report import before_after
from fdfo_engine.ops import backends, implementations
from fdfo_engine.runtime.run_status import RunStatus
from fdfo_engine.shapes.pipeline import shapes_base

needs_base = pytest.mark.skipif(not (shapes_base() / "model_index.json").is_file(), reason="the shapes base is absent")


def test_status_in_words_and_as_json(tmp_path, capsys):
    RunStatus(tmp_path).update("stopped", epoch=3, epochs=9, exit_code=75, message="SIGTERM\n\x1b[31mred")
    assert main(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "stopped (exit code 75)" in text
    assert "3 of 9" in text
    assert "the same command resumes" in text
    assert "\x1b" not in text
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epoch"] == 3


def test_status_says_how_far_what_goes_on_is(tmp_path, capsys):
    status = RunStatus(tmp_path)
    status.update("running", epoch=3, epochs=9)
    assert main(["status", str(tmp_path)]) == 0
    assert f"{tmp_path}: running\n" in capsys.readouterr().out
    status.update(phase="rollout", done=24, total=96, unit="images", eta_s=192.4, reward_mean=0.25)
    assert main(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}: running, in rollout, 24 of 96 images, left 3m 12s\n" in text
    assert "3 of 9, reward 0.2500\n" in text
    status.update("finished", exit_code=0)
    assert main(["status", str(tmp_path)]) == 0
    assert "24 of 96" not in capsys.readouterr().out


def test_status_names_a_checkpoint_of_an_earlier_process(tmp_path, capsys):
    RunStatus(tmp_path).update("finished", exit_code=0, epoch=4, epochs=4)
    assert main(["status", str(tmp_path)]) == 0
    assert "checkpoint  none yet\n" in capsys.readouterr().out
    (tmp_path / "checkpoints/epoch_000004").mkdir(parents=True)
    assert main(["status", str(tmp_path)]) == 0
    assert "checkpoint  epoch_000004\n" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"done": "\x1b[31m"}, {"total": [1]}, {"eta_s": "soon"}, {"unit": 3}, {"phase": {}}])
def test_a_status_of_other_kinds_than_written_is_damaged(wrong, tmp_path, capsys):
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "phase": "rollout", **wrong}))
    assert main(["status", str(tmp_path)]) == 7
    assert "cannot be read" in capsys.readouterr().err


def test_status_of_a_run_that_the_library_saved(tmp_path, capsys):
    (tmp_path / "checkpoints/epoch_000004").mkdir(parents=True)
    assert main(["status", str(tmp_path)]) == 0
    assert "keeps no status; newest: epoch_000004" in capsys.readouterr().out


def test_status_of_a_run_that_its_guard_stopped(tmp_path, capsys):
    RunStatus(tmp_path).update("stopped", epoch=3, epochs=9, exit_code=5, message="saturation left its band")
    assert main(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "evaluation.guard ended it" in text
    assert "the same command resumes" not in text


def test_status_of_a_vanished_process(tmp_path, capsys):
    record = {"state": "running", "epoch": 1, "epochs": 2, "heartbeat": time.time(), "pid": 2**30}
    (tmp_path / "status.json").write_text(json.dumps(record | {"host": socket.gethostname()}))
    assert main(["status", str(tmp_path)]) == 0
    assert "died" in capsys.readouterr().out


def test_a_damaged_status_is_a_storage_error(tmp_path, capsys):
    (tmp_path / "status.json").write_text("{")
    assert main(["status", str(tmp_path)]) == 7
    assert "cannot be read" in capsys.readouterr().err


def test_report_prints_before_after_and_its_path(tmp_path, capsys):
    RunStatus(tmp_path).update("finished", exit_code=0)
    lines = [
        {"epoch": e, "count": 8, "seed": 0, "weights": "raw", "metrics": {"m": v}, "metrics_stderr": {"m": 0.01}}
        for e, v in ((0, 0.25), (4, 0.75))
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "m: 0.2500 ± 0.0100 -> 0.7500 ± 0.0100 (+0.5000)  [epoch 0 -> 4, 8 images]" in text
    assert str(tmp_path / "report.html") in text
    assert (tmp_path / "report.html").is_file()


def test_before_after_needs_two_and_survives_a_metric_without_a_value():
    one = {"epoch": 0, "count": 1, "metrics": {"m": None, "only_first": 1.0}}
    assert before_after([one]) == []
    assert before_after([one, {"epoch": 1, "count": 1, "metrics": {"m": 0.5}}]) == [
        "m: none -> 0.5000  [epoch 0 -> 1, 1 images]"
    ]


def test_doctor_gives_a_line_and_a_reason_for_each_check(tmp_path, capsys):
    code = main(["doctor", "--quick", "--dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok      ops backend torch") for line in lines)
    cuda = next(line for line in lines if " ops backend cuda" in line)
    reasons = backends()["cuda"]
    assert cuda.startswith("missing") == bool(reasons)
    assert all(reason in cuda for reason in reasons)
    assert {line.split()[2] for line in lines if line.startswith("ok      op ")} == set(implementations())
    ends = [line for line in lines if line.startswith("ok      end ") and " on cpu: " in line]
    assert [line.split()[2] for line in ends] == ["Gelu", "IntoResidual", "HeadNorm"]
    assert all("behind it: a library's product ends with its bias" in line for line in ends)
    assert (code, lines[-1]) == (0, "ready to train"), lines
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports_a_broken_storage_with_code_3(tmp_path, capsys):
    assert main(["doctor", "--quick", "--dir", str(tmp_path / "absent")]) == 3
    assert "no such folder" in capsys.readouterr().out


SUBJECTS = ("prompts", "evaluation", "rewards", "packages", "model", "disk")


@needs_base
def test_doctor_with_a_config_looks_at_what_its_run_would_start_with(tmp_path, capsys, monkeypatch):
    words = ["doctor", "--quick", "--dir", str(tmp_path), "shapes", f"run.dir={tmp_path / 'run'}"]
    monkeypatch.setattr(doctor, "findings", lambda folder, quick: iter([doctor.Finding("the installation")]))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(
        f"ok      {subject}" in out for subject in ("prompts", "evaluation", "rewards", "packages", "model", "disk")
    )
    assert main([*words, "prompts.source=nowhere.txt"]) == 4
    assert "problem prompts     prompts.source = 'nowhere.txt': no such file" in capsys.readouterr().out
    assert main([*words, "rewards.0.name=nowhere"]) == 2
    assert "problem rewards" in capsys.readouterr().out
    assert main([*words, "run.epohcs=1"]) == 2
    assert "did you mean run.epochs?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_base
@pytest.mark.filterwarnings("default")
def test_generate_base_writes_pictures(tmp_path):
    out = tmp_path / "out"
    words = ["--prompt", "a red circle", "--prompt", "../..", "--out", str(out), "--untrained", "--steps", "2"]
    assert main(["generate", "shapes", *words]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0000_a_red_circle.png", "0001_prompt.png", "grid.png", "images.jsonl"]
