"""The lines that a model card tells to copy do load what lies beside it."""

import json
import re

import pytest
from diffusers import StableDiffusion3Pipeline
from tiny_sd3 import tiny_config

from fdfo_engine.config import load_config
from fdfo_engine.engine import Engine
from fdfo_engine.report.usage import absent_parts, usage
from fdfo_engine.shapes.pipeline import shapes_base


def without_t5(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    )


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_snippet_of_a_card_loads_the_export(train, tiny_sd3, tmp_path, monkeypatch):
    config = tiny_config(tiny_sd3, tmp_path / "run", model={"train": train})
    with Engine(config) as engine:
        engine.export(tmp_path / "out")
    if train == "full":
        without_t5(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    (code,) = re.findall(r"## Use\n\n```python\n(.*?)```", card, flags=re.S)
    if train == "full":
        assert absent_parts(tmp_path / "out") == ["text_encoder_3", "tokenizer_3"]
        code = re.search(r"```python\n(.*?)```", usage(config, "base", tmp_path / "out"), flags=re.S)[1]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "card", "exec"), found)
    assert found["image"].size == (config.model.width, config.model.height)


def test_a_lora_for_comfyui_says_where_it_belongs(tiny_sd3, tmp_path):
    (tmp_path / "lora_comfyui.safetensors").write_bytes(b"")
    text = usage(tiny_config(tiny_sd3, tmp_path / "run"), "owner/model", tmp_path)
    for words in ("lora_comfyui.safetensors", "models/loras", "owner/model", "guidance 1"):
        assert words in text


def test_guidance_is_that_of_the_pipeline(tiny_sd3, tmp_path):
    flux = tiny_config(tiny_sd3, tmp_path / "run", sampling={"embedded_guidance": 2.5})
    assert "guidance_scale=2.5)" in usage(flux, "a/FLUX", tmp_path)


@pytest.mark.skipif(not (shapes_base() / "model_index.json").is_file(), reason="the shapes base is absent")
def test_the_bundled_miniature_loads_by_its_snippet():
    """Its index names no third text encoder, and its parts lie in several dtypes."""
    code = re.search(r"```python\n(.*?)```", usage(load_config("shapes"), "shapes", shapes_base()), flags=re.S)[1]
    assert "=None" in code
    assert not {"text_encoder_3", "tokenizer_3"} & set(StableDiffusion3Pipeline._optional_components)  # why
    found = {}
    exec(compile(code.replace(f'"{shapes_base().name}"', repr(str(shapes_base()))), "card", "exec"), found)
    assert found["image"].size == (64, 64)
