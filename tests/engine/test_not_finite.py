"""NaN and infinity in a part of the model: found where they arise, told with the part, never scored, drawn or kept."""

import json
import shutil

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, StableDiffusion3Pipeline
from family_checks import Tiny
from safetensors.torch import load_file, save_file
from tiny_qwen_image import build_tiny_qwen_image
from tiny_sd3 import PROMPTS, tiny_config, tiny_tree

from fdfo_engine import Engine
from fdfo_engine.cli.main import main
from fdfo_engine.config import load_config
from fdfo_engine.loop import run
from fdfo_engine.models.flow_model import Grid
from fdfo_engine.models.lora import merge
from fdfo_engine.models.pipeline_model import as_images
from fdfo_engine.models.registry import load_model
from fdfo_engine.runtime.errors import NumericsError, UsageError

CPU = torch.device("cpu")
NAN = float("nan")
WEIGHTS = {"vae": "vae/diffusion_pytorch_model.safetensors", "text_encoder_2": "text_encoder_2/model.safetensors",
           "transformer": "transformer/diffusion_pytorch_model.safetensors"}  # fmt: skip


def spoilt(base, folder, part, weight, value=NAN):
    """A copy of the pipeline `base`, one number of one weight of which is `value`."""
    shutil.copytree(base, folder)
    set_number(folder, part, weight, value)
    return folder


def set_number(folder, part, weight, value):
    path = folder / WEIGHTS[part]
    tensors = load_file(path)
    tensors[weight].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Tiny(build_tiny_qwen_image(tmp_path_factory.mktemp("qwen")), QwenImagePipeline, None, {})


@pytest.fixture(scope="module")
def sd3(tiny_sd3):
    return Tiny(tiny_sd3, StableDiffusion3Pipeline, None, {})


@pytest.mark.parametrize(("kind", "weight"), [("sd3", "decoder.conv_out.bias"), ("qwen", "decoder.conv_out.bias")])
def test_a_decoder_that_gives_nan_is_named(request, tmp_path, kind, weight):
    tiny = request.getfixturevalue(kind)
    folder = spoilt(tiny.folder, tmp_path / "base", "vae", weight)
    engine = Engine(Tiny(folder, None, None, tiny.settings).config(tmp_path / "run"))
    blamed = f"its weight vae.{weight} is not finite"
    with pytest.raises(NumericsError, match=f"the VAE's decoder .* not finite for pair 0, branch 0: {blamed}"):
        engine.rollout(PROMPTS)
    assert engine.next_pair == 0
    with pytest.raises(NumericsError, match=f"the VAE's decoder .* not finite for image 3: {blamed}"):
        engine.generate(PROMPTS[:1], first=3)


def test_infinity_does_not_pass_for_white():
    decoded = torch.tensor([float("inf"), -float("inf"), NAN, 3.0, -3.0, 0.5]).view(1, 1, 1, 6)
    assert torch.equal(
        as_images(decoded).isnan(), torch.tensor([True, True, True, False, False, False]).view(1, 1, 1, 6)
    )
    assert as_images(decoded)[..., 3:].flatten().tolist() == [1.0, 0.0, 0.75]


def test_one_image_of_many_is_named(tiny_sd3, tmp_path, monkeypatch):
    engine = Engine(tiny_config(tiny_sd3, tmp_path))
    calls, decode = [], engine.model.decode

    def spoil(latents):
        images = decode(latents).clone()
        calls.append(len(images))
        if sum(calls) >= 8 and sum(calls) - len(images) < 8:  # the last of the first four pairs
            images[7 - sum(calls), 0, 0, 0] = NAN
        return images

    monkeypatch.setattr(engine.model, "decode", spoil)
    with pytest.raises(NumericsError, match=r"for pair 3, branch 1; all its weights are"):
        engine.rollout(PROMPTS)


@pytest.mark.parametrize(
    ("part", "weight", "message"),
    [
        ("transformer", "transformer_blocks.1.attn.to_q.bias", r"velocity is not finite first at {where}, step 0: {w}"),
        ("transformer", "pos_embed.proj.bias", "velocity is not finite first at {where}, step 0: {w}"),
        (
            "text_encoder_2",
            "text_model.final_layer_norm.bias",
            r"the text encoders' pooled_projections is not finite for the prompt 'a red circle': {w}",
        ),
    ],
)
def test_weights_that_are_not_finite_are_named(tiny_sd3, tmp_path, part, weight, message):
    folder = spoilt(tiny_sd3, tmp_path / "base", part, weight)
    cache = tmp_path / "prompts"
    engine = Engine(tiny_config(folder, tmp_path / "run", model={"prompt_cache": str(cache)}))
    # a layer with an adapter has its weights under another name
    told = rf"its weight {part}\.{weight.replace('to_q', 'to_q(.base_layer)?')} is not finite"
    with pytest.raises(NumericsError, match=message.format(where="pair 0, branch 0", w=told)):
        engine.rollout(PROMPTS)
    with pytest.raises(NumericsError, match=message.format(where="image 0", w=told)):
        engine.generate(PROMPTS)
    if part == "text_encoder_2":
        assert not list(cache.rglob("*.safetensors"))


def train(tree, folder):
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    run(load_config(folder / "config.yaml"))


def test_a_run_blames_the_decoder_keeps_no_pictures_and_goes_on_once_it_is_mended(tiny_sd3, tmp_path):
    folder = spoilt(tiny_sd3, tmp_path / "base", "vae", "decoder.conv_out.bias")
    tree = tiny_tree(folder, tmp_path / "run", run={"epochs": 1})
    with pytest.raises(NumericsError, match="the VAE's decoder"):
        train(tree, tmp_path)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)
    assert not (tmp_path / "run/unscored").exists()
    set_number(folder, "vae", "decoder.conv_out.bias", 0.0)
    train(tree, tmp_path)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


def test_generate_writes_no_picture_of_nan(tiny_sd3, tmp_path, capsys):
    folder = spoilt(tiny_sd3, tmp_path / "base", "vae", "decoder.conv_out.bias")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_tree(folder, tmp_path / "run")))
    words = ["--untrained", "--prompt", "a cat", "--out", str(tmp_path / "out")]
    assert main(["generate", str(tmp_path / "config.yaml"), *words]) == 6
    assert "the VAE's decoder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("out/*"))


def test_one_step_of_a_stretched_grid_is_refused(qwen, tiny_sd3, tmp_path, capsys):
    """(1 - sigma) is divided by what the last sigma lacks to 1: with one step, which is 1, 0 by 0."""
    one = {"sampling": {"steps": 1}, "update": {"optimizer_steps": 1}}
    message = r"sampling\.steps = 1: .* shift_terminal = 0\.02; takes 2 or more"
    with pytest.raises(UsageError, match=message):
        Engine(qwen.config(tmp_path / "run", **one))
    folder = tmp_path / "base"
    shutil.copytree(tiny_sd3, folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.02).save_config(folder / "scheduler")
    engine = Engine(tiny_config(folder, tmp_path / "run"))
    with pytest.raises(UsageError, match=message):
        engine.generate(PROMPTS, steps=1)
    assert engine.generate(PROMPTS, steps=2).isfinite().all()
    Engine(tiny_config(tiny_sd3, tmp_path / "plain", **one))  # without a stretch, one step is a grid


@pytest.mark.parametrize("sigmas", [[NAN, 0.0], [1.0, NAN, 0.0], [0.5, 1.0, 0.0], [1.0, 0.5], [float("inf"), 0.0]])
def test_a_grid_falls_to_zero_and_is_finite(sigmas):
    with pytest.raises(UsageError, match=f"sampling.steps = {len(sigmas) - 1}: .* takes finite numbers that fall to 0"):
        Grid(torch.tensor(sigmas), torch.ones(len(sigmas) - 1))
    with pytest.raises(UsageError, match="takes finite numbers"):
        Grid(torch.tensor([1.0, 0.0]), torch.tensor([NAN]))


def test_merged_weights_that_leave_their_dtype_are_named():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=torch.float16))
    change = {"0.lora_A.weight": torch.full((1, 2), 300.0), "0.lora_B.weight": torch.full((2, 1), 300.0)}
    with pytest.raises(NumericsError, match=r"merged, the weight 0\.weight is not finite in float16"):
        merge(network, change)


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "merged"])
def test_trained_weights_that_are_not_finite_are_not_exported(tiny_sd3, tmp_path, style):
    model = load_model(tiny_config(tiny_sd3, tmp_path / "run"), CPU)
    weights = {name: p.detach().clone() for name, p in model.trained_parameters()}
    last = list(weights)[-1]
    weights[last].view(-1)[0] = NAN
    with pytest.raises(NumericsError, match=f"the trained weight {last} is not finite"):
        model.export(tmp_path / "out", weights, style)
    assert not (tmp_path / "out").exists()


def test_an_export_of_a_damaged_base_blames_its_weight(tiny_sd3, tmp_path):
    folder = spoilt(tiny_sd3, tmp_path / "base", "transformer", "proj_out.bias")
    model = load_model(tiny_config(folder, tmp_path / "run"), CPU)
    weights = {name: p.detach().clone() for name, p in model.trained_parameters()}
    with pytest.raises(NumericsError, match=r"velocity is not finite: its weight transformer\.proj_out\.bias"):
        model.export(tmp_path / "out", weights)
