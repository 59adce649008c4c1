"""The command line itself: help, refusals and exit codes, without loading a model."""

import os
import subprocess
import sys
import time

import pytest

from fdfo_engine.cli.main import main, parser

VERBS = ("train", "generate", "evaluate", "report", "export", "status", "doctor", "pretrain-shapes")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_exits_0(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"fdfo {verb}" in capsys.readouterr().out


def test_help_of_train_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "optimizer.lr" in text
    assert "update.clip_range" in text


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom fdfo_engine.cli.main import main\n"
        "try:\n    main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 10  # well under a second on an idle machine


@pytest.mark.parametrize(
    "words", [["nonsense"], ["report"], ["evaluate"], ["status", "a", "b"], ["report", "a", "--bogus"]]
)
def test_a_wrong_command_line_exits_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_a_verb_the_help_is_printed(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--dryrun", "shapes"], "unrecognized arguments: --dryrun; did you mean --dry-run?"),
        (["generate", "runs/a", "--prompt", "a", "--out", "o", "--guidence-scale=2"], "did you mean --guidance-scale?"),
        (["report", "runs/a", "--bogus"], "unrecognized arguments: --bogus\n"),
    ],
)
def test_a_misspelt_option_is_told_with_the_verb_and_the_nearest(words, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: fdfo {words[0]}")
    assert says in error


@pytest.mark.parametrize("verb", ["generate", "evaluate", "export", "report", "status"])
def test_a_run_that_is_not_there_is_told_with_those_that_are(verb, tmp_path, capsys):
    for name in ("first", "second", "no_run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "no_run":
            (tmp_path / "runs" / name / "config.yaml").write_text("")
    more = {"generate": ["--prompt", "a", "--out", f"{tmp_path}/out"], "export": [f"{tmp_path}/out"]}
    assert main([verb, f"{tmp_path}/runs/third", *more.get(verb, [])]) in (2, 7)
    error = capsys.readouterr().err
    assert "no run there" in error or "no run folder" in error or "no such run folder" in error
    assert f"runs in {tmp_path}/runs: first, second" in error


@pytest.mark.parametrize("words", [["--config", "shapes"], ["shapes"], ["run.seed=3", "shapes"]])
def test_the_config_may_be_given_by_position(words, tmp_path, capsys):
    assert main(["train", *words, "--dry-run", f"run.dir={tmp_path}/run", "--ranks", "1"]) == 0
    out = capsys.readouterr().out
    assert f"dir: {tmp_path}/run" in out
    assert ("  seed: 3\n" in out) == ("run.seed=3" in words)


def test_settings_may_stand_around_options():
    from fdfo_engine.cli.main import _parsed

    arguments = _parsed(parser(), ["train", "run.epochs=1", "--config", "shapes", "run.seed=2", "--ranks", "3"])
    assert (arguments.overrides, arguments.ranks) == (["run.epochs=1", "run.seed=2"], 3)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["report", "NOWHERE"], 2, "no run folder"),
        (["status", "NOWHERE"], 2, "no run folder"),
        (["export", "NOWHERE", "NOWHERE/out"], 7, "no run there"),
        (["generate", "NOWHERE", "--prompt", "a", "--out", "NOWHERE/out"], 2, "no such run folder"),
        (["generate", "NOWHERE.yaml", "--prompt", "a", "--out", "NOWHERE/out"], 2, "no such file"),
        (["evaluate", "NOWHERE", "--out", "NOWHERE/out"], 7, "no run there"),
        (["generate", "shapes", "--prompt", "a", "--out", "NOWHERE/out", "--steps", "0"], 2, "--steps 0"),
        (["train", "--config", "NOWHERE/x.yaml", "--ranks", "2"], 2, "no such file"),
        (["train", "NOWHERE/x.yaml", "--ranks", "2"], 2, "no such file"),
        (["train", "--ranks", "1"], 2, "no config: takes a YAML file"),
        (["train", "--config", "shapes", "sd35m_pickscore"], 2, "shapes, sd35m_pickscore: takes one config"),
        (["train", "shapes", "run.epochs"], 2, "shapes, run.epochs: takes one config; a setting is given as"),
        (["plan", "run.epochs=1"], 2, "no config: takes a YAML file"),
        (["train", "--config", "shapes", "--ranks", "0"], 2, "--ranks 0"),
        (["train", "--config", "shapes", "--ranks", "2", "optimizer.lrr=1"], 2, "did you mean optimizer.lr?"),
        (["pretrain-shapes", "NOWHERE/out", "--continue-from", "NOWHERE"], 3, "no diffusers pipeline folder"),
    ],
)
def test_a_mistake_is_one_readable_line_and_its_code(words, code, says, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert main([word.replace("NOWHERE", nowhere) for word in words]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "Traceback" not in error


def test_train_dry_run_prints_the_settings(tmp_path, capsys):
    assert main(["train", "--config", "shapes", "--ranks", "1", "--dry-run", f"run.dir={tmp_path}/run"]) == 0
    assert "pairs_per_epoch" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_export_and_generate_leave_a_filled_folder_alone(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    assert main(["export", str(tmp_path), str(tmp_path)]) == 2
    assert main(["generate", "shapes", "--prompt", "a", "--out", str(tmp_path)]) == 2
    assert main(["pretrain-shapes", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("pass --overwrite\n") == 3, "and no Python keyword beside it"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_reader_that_has_gone_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "from fdfo_engine.cli import main, status\nstatus.run = lambda _: print('x') or 0\nmain.command()"
    words = [sys.executable, "-c", code, "status", "a"]
    done = subprocess.run(words, stdout=write_end, stderr=subprocess.PIPE, timeout=120)
    os.close(write_end)
    assert (done.returncode, b"BrokenPipe" in done.stderr) == (0, False), done.stderr.decode()
