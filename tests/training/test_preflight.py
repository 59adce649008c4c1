"""What a dry run finds before a weight is loaded: each thing that would stop the run, and all at once."""

import shutil
from collections import namedtuple
from itertools import islice

import pytest
from fake_hub import HubServer, hub_of
from tiny_sd3 import tiny_config

from fdfo_engine.cli.main import main
from fdfo_engine.config import bundled_configs, load_config
from fdfo_engine.training import preflight as module
from fdfo_engine.training.preflight import preflight

NAME = "owner/model"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("fdfo_engine.models.pipeline_model.load_pipeline", never)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_of(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def found(config):
    return {finding.subject: finding for finding in preflight(config)}


def on_hub(tmp_path, **sections):
    return tiny_config(tmp_path, tmp_path / "run", model={"id": NAME}, **sections)


def test_a_run_that_would_start_is_all_well(tmp_path, capsys):
    assert main(["train", "shapes", "--dry-run", "--ranks", "2", f"run.dir={tmp_path}/run"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[-6:]] == [
        ["ok", name] for name in ("prompts", "evaluation", "rewards", "packages", "model", "disk")
    ]
    assert "blocks: 8 of 12 pairs; 4 a rank on 2 ranks" in out
    assert not (tmp_path / "run").exists()


def test_every_problem_is_told_once_and_the_first_gives_the_status(tmp_path, capsys, hub):
    words = ["prompts.source=nofile.txt", "model.id=owner/model", "model.max_sequence_length=0"]
    assert main(["train", "shapes", "--dry-run", "--ranks", "1", f"run.dir={tmp_path}/run", *words]) == 4
    out = capsys.readouterr().out
    assert out.count("prompts.source = 'nofile.txt': no such file") == 1
    assert "problem model       model.id = 'owner/model': no such repository on the hub" in out


def test_a_model_to_be_fetched_is_told_with_its_size_and_then_as_here(hub, tiny_sd3, tmp_path):
    hub.folders[NAME] = tiny_sd3
    weights = sum(file.stat().st_size for file in tiny_sd3.glob("*/*.safetensors"))
    text = found(on_hub(tmp_path))["model"].text
    assert f"{weights / 1e9:.1f} GB to be fetched from the hub" in text
    assert not [path for method, path in hub.asked if path.endswith(".safetensors")]
    shutil.copytree(tiny_sd3, tmp_path / f"cache/models--owner--model/snapshots/{HubServer.commit}", dirs_exist_ok=True)
    assert "in the hub's cache" in found(on_hub(tmp_path))["model"].text


def test_too_little_room_is_a_problem(hub, tiny_sd3, tmp_path, monkeypatch):
    hub.folders[NAME] = tiny_sd3
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    findings = found(on_hub(tmp_path))
    assert "GB to fetch, and 0.0 GB free in" in findings["model"].text
    assert "0.0 GB free there" in findings["disk"].text
    assert (findings["model"].exit_code, findings["disk"].exit_code) == (3, 3)


def test_packages_are_asked_for_before_anything_is_loaded(hub, tiny_sd3, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    findings = found(tiny_config(tiny_sd3, tmp_path / "run", log={"wandb": True}))
    assert 'pip install "fdfo-engine[wandb]"' in findings["packages"].text
    assert findings["packages"].exit_code == 3
    assert findings["model"].exit_code == 0


def test_a_reward_of_ones_own_that_is_not_there(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run", rewards=[{"name": "./nowhere.py:f", "weight": 1.0}])
    assert found(config)["rewards"].exit_code != 0


@pytest.mark.parametrize("name", sorted(set(bundled_configs()) - {"shapes", "shapes_fast"}))
def test_the_prompts_of_every_shipped_config_are_there_and_held_out(name, capsys):
    config = load_config(name)
    prompts, evaluation = islice(preflight(config), 2)
    assert prompts.exit_code == evaluation.exit_code == 0
    assert prompts.text.startswith("336 prompts")
    assert evaluation.text == "every 10 epochs, on 64 of 64 prompts"
    assert "trained on" not in capsys.readouterr().err
