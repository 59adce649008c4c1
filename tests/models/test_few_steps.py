"""Which models are known to be made for a few steps, by what their configs and names say, and which are not."""

import json
import math
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from fake_hub import publish, use_cache
from pydantic import ValidationError
from tiny_sd3 import tiny_config

from fdfo_engine.models.few_steps import FewSteps, find_few_steps, refuse_many_steps
from fdfo_engine.models.known import known_configs
from fdfo_engine.models.registry import load_model, locate_base
from fdfo_engine.runtime.errors import UsageError

CPU = torch.device("cpu")
KNOWN = ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large",
         "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image")  # fmt: skip
LIGHTNING = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None, "use_dynamic_shifting": True}
"""Of Qwen-Image-Lightning's own `generate_with_diffusers.py`."""


def configs(folder, pipeline, transformer=None, scheduler=None, **of_index):
    """A folder with a pipeline's configs; the scheduler's are what diffusers writes."""
    for part, values in (("transformer", transformer or {}), ("scheduler", scheduler or {})):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(values))
    FlowMatchEulerDiscreteScheduler(**(scheduler or {})).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **of_index}))
    return folder


@pytest.mark.parametrize("model_id", KNOWN)
def test_models_that_follow_a_flow(model_id):
    assert find_few_steps(model_id, known_configs(model_id)) is None


@pytest.mark.parametrize(
    ("pipeline", "transformer", "scheduler", "most"),
    [
        ("FluxPipeline", {"guidance_embeds": False}, {"shift": 1.0}, 4),
        ("FluxPipeline", {}, {}, 4),
        ("FluxPipeline", {"guidance_embeds": True}, {"shift": 1.0}, None),
        ("FluxPipeline", {"guidance_embeds": False}, {"use_dynamic_shifting": True}, None),
        ("QwenImagePipeline", {"guidance_embeds": False}, LIGHTNING, 8),
        ("QwenImagePipeline", {}, {**LIGHTNING, "shift_terminal": 0.02}, None),
        ("QwenImagePipeline", {}, {**LIGHTNING, "max_shift": 0.9}, None),
        ("StableDiffusion3Pipeline", {"guidance_embeds": False}, {"shift": 1.0}, None),
    ],
)
def test_what_configs_say(tmp_path, pipeline, transformer, scheduler, most):
    found = find_few_steps("x/y", configs(tmp_path / "renamed", pipeline, transformer or {"in_channels": 1}, scheduler))
    assert (found and found.most) == most


SD3 = "StableDiffusion3Pipeline"


@pytest.mark.parametrize(
    ("model_id", "most"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", 4),
        ("/models/sd3.5_large_turbo", 4),
        ("/models/SD3.5-Large-Turbo/main", 4),
        ("/hub/models--x--stable-diffusion-3.5-large-turbo/snapshots/ec07796fc06b096cc56de9762974a28f4c632eda", 4),
        ("tensorart/stable-diffusion-3.5-large-TurboX", 8),
        ("me/sd3.5-turbo-8steps", 8),
        ("me/Hyper-SD3-4-steps-merged", 4),
        ("me/qwen-image-lightning", 8),
        ("/mnt/turbo/stable-diffusion-3.5-large", None),
        ("/mnt/flash/models/sd35", None),
        ("me/turbocharged", None),
        ("me/sd3.5-large-40-steps", None),
    ],
)  # fmt: skip
def test_what_a_name_says(tmp_path, model_id, most):
    found = find_few_steps(model_id, configs(tmp_path / "renamed", SD3, {"in_channels": 1}))
    assert (found and found.most) == most
    assert found is None or model_id in found.sign


@pytest.mark.parametrize("place", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_renamed_folder_keeps_the_name_in_its_configs(tmp_path, place):
    folder = configs(tmp_path / "renamed", SD3, {"in_channels": 1})
    values = json.loads((folder / place).read_text())
    (folder / place).write_text(json.dumps(values | {"_name_or_path": "/old/stable-diffusion-3.5-large-turbo"}))
    found = find_few_steps("/home/me/renamed", folder)
    assert found.most == 4
    assert place in found.sign


def test_a_model_of_the_hub_is_known_by_its_repository(tiny_sd3, tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path / "cache")
    snapshot = publish(tmp_path / "cache", "x/stable-diffusion-3.5-large-turbo", tiny_sd3)
    for model_id in ("x/stable-diffusion-3.5-large-turbo", str(snapshot)):
        config = tiny_config(tiny_sd3, tmp_path / "run", model={"id": model_id}, sampling={"steps": 40})
        with pytest.raises(UsageError, match=r"takes 1 to 4 steps.*turbo.*model\.few_steps: false"):
            load_model(config, CPU)
        load_model(config.model_copy(update={"sampling": config.sampling.model_copy(update={"steps": 4})}), CPU)


@pytest.mark.parametrize(
    ("setting", "steps", "is_taken"),
    [("auto", 40, False), ("auto", 4, True), (False, 40, True), (8, 8, True), (8, 10, False), (2, 4, False)],
)
def test_the_setting_overrules_what_is_known(tiny_sd3, tmp_path, setting, steps, is_taken):
    turbo = shutil.copytree(tiny_sd3, tmp_path / "sd3.5-large-turbo")
    config = tiny_config(turbo, tmp_path / "run", model={"few_steps": setting}, sampling={"steps": steps})
    if is_taken:
        refuse_many_steps(config, turbo)
        return
    with pytest.raises(UsageError, match=f"sampling.steps = {steps}: this model takes 1 to"):
        refuse_many_steps(config, turbo)


def test_a_model_that_says_nothing_is_told_by_the_setting(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run", model={"few_steps": 2})
    assert find_few_steps(config.model.id, tiny_sd3) is None
    with pytest.raises(UsageError, match=r"takes 1 to 2 steps, for which it was distilled \(model.few_steps\)"):
        load_model(config, CPU)


@pytest.mark.parametrize("value", [True, 0, -1, "yes", None])
def test_what_the_setting_does_not_take(tiny_sd3, tmp_path, value):
    with pytest.raises(ValidationError, match="few_steps"):
        tiny_config(tiny_sd3, tmp_path, model={"few_steps": value})


def test_the_sign_is_said_and_damaged_configs_are_left_to_loading(tiny_sd3, tmp_path):
    assert locate_base(tiny_config(tiny_sd3, tmp_path)).folder == tiny_sd3.resolve()
    (tmp_path / "model_index.json").write_text("{")
    assert find_few_steps("me/sd-turbo", tmp_path) == FewSteps(4, "model.id says turbo: me/sd-turbo")
    assert find_few_steps("me/sd", tmp_path) is None
