"""An engine in somebody else's process: what it leaves there, and what it gives back."""

import gc
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from engine.launching import environment
from PIL import Image
from tiny_sd3 import PROMPTS, tiny_config

import fdfo_engine
from fdfo_engine.config import ConfigError, load_config
from fdfo_engine.engine import Engine
from fdfo_engine.runtime.errors import CheckpointError, UsageError
from fdfo_engine.shapes.pipeline import shapes_base

ROOT = Path(__file__).resolve().parents[2]
REWARDS = torch.tensor([[0.0, 1.0]] * 4)
needs_base = pytest.mark.skipif(not (shapes_base() / "model_index.json").is_file(), reason="the shapes base is absent")

HOST = """
import json, os, sys, warnings
sys.path[:0] = {paths!r}
from tiny_sd3 import PROMPTS, tiny_config
from fdfo_engine import Engine
import deepspeed, diffusers, psutil, torch, transformers
before, hook, filters = dict(os.environ), sys.excepthook, list(warnings.filters)
with Engine(tiny_config(__import__("pathlib").Path({pipeline!r}), {run!r})) as engine:
    engine.update(engine.rollout(PROMPTS), torch.tensor([[0.0, 1.0]] * 4))
    listens = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
added = [f for f in warnings.filters if f not in filters]
print(json.dumps({{"environment": dict(os.environ) == before, "hook": sys.excepthook is hook, "filters": len(added),
                   "listens": listens}}))
os._exit(0)
"""


@pytest.mark.slow
def test_the_host_process_stays_as_it_was(tiny_sd3, tmp_path):
    code = HOST.format(paths=[str(ROOT), str(ROOT / "tests")], pipeline=str(tiny_sd3), run=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = __import__("json").loads(done.stdout.splitlines()[-1])
    assert found["environment"]
    assert found["hook"]
    assert found["filters"] <= 1
    assert set(found["listens"]) <= {"127.0.0.1", "::1"}


def test_building_an_engine_changes_nothing_of_the_process(tiny_sd3, tmp_path):
    before, hook, filters = dict(os.environ), sys.excepthook, len(warnings.filters)
    Engine(tiny_config(tiny_sd3, tmp_path)).close()
    assert (dict(os.environ), sys.excepthook) == (before, hook)
    assert len(warnings.filters) <= filters + 1


@pytest.mark.parametrize(
    ("train", "stage"),
    [
        ("lora", 1),
        ("full", 3),
        *(pytest.param("lora", stage, marks=pytest.mark.slow) for stage in (0, 2, 3)),
        *(pytest.param("full", stage, marks=pytest.mark.slow) for stage in (0, 1, 2)),
    ],
)
def test_a_closed_engine_gives_its_memory_back(tiny_sd3, tmp_path, stage, train):
    linear = torch.nn.functional.linear
    engine = Engine(tiny_config(tiny_sd3, tmp_path, zero={"stage": stage}, model={"train": train}, update={"ema": 0.5}))
    engine.update(engine.rollout(PROMPTS), REWARDS)
    watched = {
        "network": weakref.ref(engine.model.network),
        "engine": weakref.ref(engine.trainer.engine),
        "weight": weakref.ref(next(engine.model.network.parameters())),
        "vae": weakref.ref(engine.model.pipeline.vae),
    }
    held = list(engine.model.network.parameters())
    masters = list(engine.trainer._masters())
    engine.close()
    engine.close()
    assert torch.nn.functional.linear is linear
    if stage == 3:  # DeepSpeed's modules outlive it there, without what they weigh
        assert not any(p.numel() or p.ds_tensor.numel() for p in held)
        assert not any(master.numel() for master in masters)
        watched = {"vae": watched["vae"]}
    del engine, held, masters
    gc.collect()
    assert not [name for name, reference in watched.items() if reference() is not None]


def test_a_closed_engine_says_so(tiny_sd3, tmp_path):
    with Engine(tiny_config(tiny_sd3, tmp_path)) as engine:
        assert not engine.is_closed
    assert engine.is_closed
    for use in (lambda: engine.rollout(PROMPTS), lambda: engine.generate(PROMPTS), lambda: engine.epoch, engine.save):
        with pytest.raises(UsageError, match="was closed"):
            use()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        Engine(tiny_config(tiny_sd3, tmp_path)).nothing  # noqa: B018


def epoch_of(config):
    with Engine(config) as engine:
        rollout = engine.rollout(PROMPTS)
        engine.update(rollout, REWARDS)
        return rollout.images, engine.trainer.weights()


@pytest.mark.slow
def test_two_engines_in_two_threads_work_as_one_after_the_other(tiny_sd3, tmp_path):
    configs = [tiny_config(tiny_sd3, tmp_path / str(seed), run={"seed": seed}) for seed in (5, 6)]
    alone, together = [epoch_of(config) for config in configs], [None, None]

    def work(i):
        together[i] = epoch_of(configs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (images, weights), (images_2, weights_2) in zip(alone, together, strict=True):
        assert images.equal(images_2)
        assert all(torch.equal(weight, weights_2[name]) for name, weight in weights.items())
    assert not alone[0][0].equal(alone[1][0])


def test_a_clash_with_another_run_is_told_before_any_work(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run")
    with Engine(config) as engine:
        engine.update(engine.rollout(PROMPTS), REWARDS)
        engine.save()
        engine.rollout(PROMPTS)
    with Engine(config) as fresh:
        fresh.generate(PROMPTS[:1])
        with pytest.raises(CheckpointError, match="holds epoch_000001, which this engine neither loaded nor saved"):
            fresh.rollout(PROMPTS)
        fresh.load()
        fresh.rollout(PROMPTS)


def test_names_are_there_to_be_found():
    assert set(fdfo_engine.__all__) <= set(dir(fdfo_engine))
    for name in fdfo_engine.__all__:
        assert getattr(fdfo_engine, name) is not None
    assert fdfo_engine.rewards.register is fdfo_engine.register
    assert issubclass(fdfo_engine.Cancelled, fdfo_engine.Stopped)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fdfo_engine.nothing  # noqa: B018


def test_a_rollout_is_shown_in_short(tiny_sd3, tmp_path):
    with Engine(tiny_config(tiny_sd3, tmp_path)) as engine:
        rollout = engine.rollout(PROMPTS)
        assert repr(rollout) == "Rollout(4 pairs, 4 steps, 16 x 16, after 0 optimiser steps)"
        assert torch.equal(rollout.gather_images(), rollout.images)
        engine.update(rollout, REWARDS)
        assert repr(rollout).endswith(", used)")


def test_overrides_as_a_mapping():
    config = load_config(
        "shapes", {"run.dir": Path("x"), "run.epochs": 3, "sampling": {"steps": 4}, "optimizer.lr": 0.5}
    )
    assert (config.run.dir, config.run.epochs, config.sampling.steps, config.optimizer.lr) == ("x", 3, 4, 0.5)
    texts = load_config("shapes", ["run.dir=x", "run.epochs=3", "sampling={steps: 4}", "optimizer.lr=0.5"])
    assert config == texts
    with pytest.raises(ConfigError, match=r"override run\.epochz: unknown key"):
        load_config("shapes", {"run.epochz": 3})
    with pytest.raises(ConfigError, match=r"takes section\.key"):
        load_config("shapes", {3: 4})


def test_images_become_pictures_and_files(tmp_path):
    images = torch.rand(2, 2, 3, 8, 12)
    pictures = fdfo_engine.to_pictures(images)
    assert [picture.size for picture in pictures] == [(12, 8)] * 4
    files = fdfo_engine.save_images(images, tmp_path / "new", stem="pair")
    assert [file.name for file in files] == [f"pair_{n:04d}.png" for n in range(4)]
    with Image.open(files[3]) as picture:
        red = torch.tensor(picture.getdata(0)).view(8, 12) / 255
    assert (red - images[1, 1, 0]).abs().max() <= 0.5 / 255 + 1e-6


def snippets(file):
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.S)


@needs_base
@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("docs/LIBRARY.md", 1),
        pytest.param("docs/LIBRARY.md", 0, marks=pytest.mark.slow),
        pytest.param("README.md", 0, marks=pytest.mark.slow),
    ],
)
def test_snippets_run_as_printed(file, number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets(file)[number], file, "exec"), {"__name__": "__main__"})
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 1
    assert (runs[0] / "checkpoints/epoch_000001/manifest.json").is_file()
    from fdfo_engine.cli.main import main

    assert main(["status", str(runs[0])]) == 0
