"""Which pipelines have a family, which are refused, and what is said."""

import json
import shutil

import diffusers
import pytest
import torch
from tiny_sd3 import tiny_config

from fdfo_engine.models.registry import FAMILIES, REFUSED, load_model
from fdfo_engine.planning.footprint import blank_footprint
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

CPU = torch.device("cpu")


def test_pipelines_are_those_of_diffusers_and_of_the_families():
    for pipeline, _ in FAMILIES.values():
        assert pipeline not in REFUSED
    for name in [*REFUSED, *(pipeline for pipeline, _ in FAMILIES.values())]:
        assert hasattr(diffusers, name), name


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("FluxFillPipeline", "is a FluxFillPipeline: it starts from an image beside the prompt"),
        ("Flux2Pipeline", "is a Flux2Pipeline: another architecture"),
        ("QwenImageEditPipeline", "is a QwenImageEditPipeline: it starts from an image"),
        ("SanaPipeline", "is a SanaPipeline: takes one of .*FluxPipeline"),
    ],
)
def test_other_pipelines_are_refused_by_name(tmp_path, pipeline, message):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(UsageError, match=message):
        load_model(tiny_config(tmp_path, tmp_path / "run"), CPU)


def test_a_pipeline_of_another_family_is_refused(tiny_sd3, tmp_path):
    for family in ("flux", "qwen_image"):
        config = tiny_config(tiny_sd3, tmp_path / "run", model={"family": family})
        for load in (lambda c: load_model(c, CPU), blank_footprint):
            with pytest.raises(UsageError, match=f"model.family = '{family}': .* of the sd3 family"):
                load(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("vae"), "vae"),
        (lambda index: index.update(vae=["diffusers", "NoSuchVae"]), "NoSuchVae"),
        (None, "is no list of a pipeline's parts"),
    ],
)
def test_a_damaged_index_is_one_message(tiny_sd3, tmp_path, change, message):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd3, folder)
    index = json.loads((folder / "model_index.json").read_text())
    if change is not None:
        change(index)
    (folder / "model_index.json").write_text("{" if change is None else json.dumps(index))
    for load in (lambda c: load_model(c, CPU), blank_footprint):
        with pytest.raises(EnvironmentProblem, match=message):
            load(tiny_config(folder, tmp_path / "run"))


def test_a_turbo_model_is_refused_at_many_steps(tiny_sd3, tmp_path):
    turbo = tmp_path / "sd3.5-large-turbo"
    turbo.symlink_to(tiny_sd3)
    load_model(tiny_config(turbo, tmp_path / "run", sampling={"steps": 4}), CPU)
    with pytest.raises(UsageError, match=r"sampling.steps = 40: this model takes 1 to 4 steps, .*turbo"):
        load_model(tiny_config(turbo, tmp_path / "run", sampling={"steps": 40}), CPU)
    with pytest.raises(UsageError, match=r"sampling.steps = 40: this model takes 1 to 4 steps, .*turbo"):
        blank_footprint(tiny_config(turbo, tmp_path / "run", sampling={"steps": 40}))
