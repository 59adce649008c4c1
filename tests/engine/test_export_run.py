"""`export_run`, behind `fdfo export`: a checkpoint's weights without an engine."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.cli.main import main
from fdfo_engine.config import dump_config
from fdfo_engine.exporting import export_run
from fdfo_engine.runtime.errors import CheckpointError, UsageError


@pytest.fixture
def engine(tiny_sd3, tmp_path):
    """Trained for an epoch, with an average that lags behind, and saved."""
    engine = Engine(tiny_config(tiny_sd3, tmp_path / "run", update={"ema": 0.5}, optimizer={"lr": 0.05}))
    engine.update(engine.rollout(PROMPTS), [[0.0, 1.0], [1.0, 0.0], [0.5, 0.25], [0.0, 1.0]])
    engine.save()
    return engine


def contents(folder):
    """Files by name; the folder, which the model card's lines name, goes by one name."""
    name = f'"{folder.name}"'.encode()
    return {path.name: path.read_bytes().replace(name, b"FOLDER") for path in folder.iterdir()}


def tensors(folder):
    return {path.name: load_file(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("weights", ["auto", "ema", "raw"])
def test_it_writes_what_the_engine_does(engine, tmp_path, weights):
    engine.export(tmp_path / "by_engine", weights=weights)
    assert export_run(tmp_path / "run", tmp_path / "out", weights=weights) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "by_engine")
    other = export_run(tmp_path / "run", tmp_path / "other", weights="raw" if weights != "raw" else "ema")
    assert other == 1
    assert contents(tmp_path / "other")["README.md"] == contents(tmp_path / "out")["README.md"]
    (name,) = tensors(tmp_path / "out")
    one, another = (tensors(tmp_path / folder)[name] for folder in ("out", "other"))
    assert any((one[key] != another[key]).any() for key in one)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_are_readable_as_any_new_file(engine, tmp_path, umask):
    before = os.umask(umask)
    try:
        engine.save()
        engine.rollout(PROMPTS).save(tmp_path / "rollout")
        for style in ("diffusers", "comfyui", "merged"):
            export_run(tmp_path / "run", tmp_path / style, style=style)
    finally:
        os.umask(before)
    for folder in ("run/checkpoints", "rollout", "diffusers", "comfyui", "merged"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}, folder


@pytest.mark.parametrize(
    ("changes", "words", "says"),
    [
        ({"train": "full"}, ["--merge"], "--merge is a LoRA's, and this run trains every weight"),
        ({"train": "full"}, ["--style", "comfyui"], "--style comfyui is a LoRA's"),
        ({"quantize": "nf4"}, ["--merge"], "--merge: the LoRA was trained on weights in nf4"),
        ({}, ["--ema"], "--ema: the run keeps no average"),
    ],
)
def test_the_command_refuses_before_anything_is_loaded(tmp_path, capsys, changes, words, says):
    (tmp_path / "run").mkdir()
    config = tiny_config(tmp_path, tmp_path / "run", model=changes)  # not even a model is there
    (tmp_path / "run/config.yaml").write_text(dump_config(config))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")
    assert not (tmp_path / "out").exists()


def test_a_style_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_config(tiny_config(tmp_path, tmp_path / "run")))
    code = (
        "import sys\nfrom fdfo_engine.cli.main import main\n"
        "assert main(['export', 'run', 'out', '--ema']) == 2 and main(['status', 'nowhere']) == 2\n"
        "assert not {'torch', 'diffusers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--ema: the run keeps no average" in done.stderr


@pytest.mark.slow
def test_neither_deepspeed_nor_a_group(engine, tmp_path):
    script = (
        "import sys\nfrom fdfo_engine.cli.main import main\nassert main(sys.argv[1:]) == 0\n"
        "import torch\nassert 'deepspeed' not in sys.modules and not torch.distributed.is_initialized()"
    )
    words = [sys.executable, "-c", script, "export", str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "epoch 1 written to" in done.stdout


def test_refuses(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 ranks would write one folder"):
        export_run(tmp_path / "run", tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="no run there"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no checkpoint 'epoch_7'"):
        export_run(tmp_path / "run", tmp_path / "out", checkpoint="epoch_7")
    with pytest.raises(UsageError, match="is not empty"):
        export_run(tmp_path / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("rank: 4", "rank: 2"))
    with pytest.raises(CheckpointError, match=r"of another model\n  lora.rank"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
