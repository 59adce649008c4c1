"""The SD3 family against diffusers' own pipeline, with random weights."""

import json
import shutil

import family_checks as checks
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from tiny_sd3 import PROMPTS, SIZE, tiny_config

from fdfo_engine import Engine
from fdfo_engine.cli.main import main
from fdfo_engine.models.registry import load_model
from fdfo_engine.ops import GENERATION_STREAM, philox_normal
from fdfo_engine.runtime.errors import CheckpointError, EnvironmentProblem, UsageError

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture
def config(tiny_sd3, tmp_path):
    return tiny_config(tiny_sd3, tmp_path / "run")


def diffusers_images(pipeline, guidance, seed=0):
    pipeline.set_progress_bar_config(disable=True)
    noise = philox_normal((4, 8, 8), seed=seed, pair_ids=range(len(PROMPTS)), stream=GENERATION_STREAM, device="cpu")
    return pipeline(
        list(PROMPTS), latents=noise, num_inference_steps=STEPS, guidance_scale=guidance, height=SIZE, width=SIZE,
        output_type="pt", max_sequence_length=16,
    ).images  # fmt: skip


def moved(engine, scale=0.1):
    """Puts random trained weights into `engine`."""
    generator = torch.Generator().manual_seed(3)
    weights = {n: w + scale * torch.randn(w.shape, generator=generator) for n, w in engine.trainer.weights().items()}
    engine.trainer.load(weights, engine.trainer.state())
    return weights


def largest(difference):
    return difference.abs().max().item()


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_generation_without_churn_is_the_pipelines_own(tiny_sd3, config, guidance):
    images = Engine(config).generate(PROMPTS, seed=7, guidance_scale=guidance)
    assert largest(images - diffusers_images(StableDiffusion3Pipeline.from_pretrained(tiny_sd3), guidance, 7)) < 1e-5


def test_guidance_and_prompts_matter(config):
    engine = Engine(config)
    plain, guided = engine.generate(PROMPTS), engine.generate(PROMPTS, guidance_scale=4.5)
    assert largest(plain - guided) > 1e-2
    assert largest(plain - engine.generate(PROMPTS[::-1])) > 1e-3


def test_one_image_does_not_depend_on_its_batch(tiny_sd3, tmp_path):
    """A forward's last bits depend on the batch, so nearly: 1e-5 of an image in 0..1."""
    whole = Engine(tiny_config(tiny_sd3, tmp_path / "a", evaluation={"every": 0, "batch": 4})).generate(PROMPTS)
    parts = Engine(tiny_config(tiny_sd3, tmp_path / "b", evaluation={"every": 0, "batch": 3})).generate(PROMPTS)
    assert largest(whole - parts) < 1e-5


def test_lora_is_on_the_joint_attention_and_changes_nothing_yet(tiny_sd3, config):
    model = load_model(config, CPU)
    names, parameters = zip(*model.trained_parameters(), strict=True)
    found = {name.split(".lora_")[0] for name in names}
    joint = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    wanted = {f"transformer_blocks.{block}.attn.{part}" for block in (0, 1) for part in joint}
    # the last block drops the text stream behind its attention, so it has no projection out of it
    assert found == wanted | {"transformer_blocks.0.attn.to_add_out"}
    assert all(p.dtype == torch.float32 for p in parameters)
    assert all(p.eq(0).all() == (".lora_B." in name) for name, p in zip(names, parameters, strict=True))
    assert all(p.requires_grad == (name in names) for name, p in model.network.named_parameters())


def test_lora_is_float32_on_a_bfloat16_model(tiny_sd3, tmp_path):
    model = load_model(tiny_config(tiny_sd3, tmp_path, model={"dtype": "bfloat16"}), CPU)
    names = {name for name, _ in model.trained_parameters()}
    dtypes = {name: p.dtype for name, p in model.network.named_parameters()}
    assert {dtypes[name] for name in names} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in names} == {torch.bfloat16}


def test_without_adapter_is_the_base_model(config):
    engine = Engine(config)
    before = engine.generate(PROMPTS)
    moved(engine)
    with engine.model.without_adapter():
        off = engine.generate(PROMPTS)
    assert torch.equal(off, before)
    assert largest(engine.generate(PROMPTS) - before) > 1e-2
    assert all(p.requires_grad for _, p in engine.model.trained_parameters())


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_exported_lora_gives_the_same_images_in_diffusers(tiny_sd3, config, tmp_path, guidance):
    engine = Engine(config)
    moved(engine)
    engine.export(tmp_path / "out")
    fresh = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    base = diffusers_images(fresh, guidance)
    fresh.load_lora_weights(tmp_path / "out")
    images = diffusers_images(fresh, guidance)
    assert largest(images - engine.generate(PROMPTS, guidance_scale=guidance)) < 1e-5
    assert largest(images - base) > 1e-2


def test_exported_full_model_gives_the_same_images_in_diffusers(tiny_sd3, tmp_path):
    engine = Engine(tiny_config(tiny_sd3, tmp_path / "run", model={"train": "full"}))
    base = engine.generate(PROMPTS)
    moved(engine, scale=0.02)
    engine.export(tmp_path / "out")
    images = diffusers_images(StableDiffusion3Pipeline.from_pretrained(tmp_path / "out"), 1.0)
    assert largest(images - engine.generate(PROMPTS)) < 1e-5
    assert largest(images - base) > 1e-2


def test_only_linear_layers_are_adapted(tiny_sd3, tmp_path):
    with pytest.raises(UsageError, match=r"pos_embed\.proj is a Conv2d; adapters are for linear layers"):
        load_model(tiny_config(tiny_sd3, tmp_path, lora={"targets": ["pos_embed.proj"]}), CPU)


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscreteScheduler", "stochastic", "inverted"])
def test_a_scheduler_of_another_kind_is_refused(tiny_sd3, tmp_path, scheduler):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd3, folder)
    flags = {"stochastic_sampling": scheduler == "stochastic", "invert_sigmas": scheduler == "inverted"}
    if scheduler.startswith("Flow"):
        FlowMatchHeunDiscreteScheduler().save_config(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", scheduler]
        (folder / "model_index.json").write_text(json.dumps(index))
    else:
        FlowMatchEulerDiscreteScheduler(**flags).save_config(folder / "scheduler")
    with pytest.raises(UsageError, match="its scheduler"):
        load_model(tiny_config(folder, tmp_path / "run"), CPU)


def test_a_merged_export_gives_the_same_images_in_diffusers(tiny_sd3, config, tmp_path, capsys):
    engine = Engine(config)
    moved(engine)
    engine.export(tmp_path / "out", style="merged")
    assert "whose change is 0.0% off the LoRA's" in capsys.readouterr().out
    images = diffusers_images(StableDiffusion3Pipeline.from_pretrained(tmp_path / "out"), 1.0)
    assert largest(images - engine.generate(PROMPTS)) < 1e-5


def test_the_export_verb(config, tmp_path, capsys):
    engine = Engine(config)
    moved(engine)
    engine.save()
    comfyui = "lora_comfyui.safetensors"
    written = {"pytorch_lora_weights.safetensors": [], comfyui: ["--style", "comfyui"], "model_index.json": ["--merge"]}
    for file, words in written.items():
        out = tmp_path / "_".join(["out", *words])
        assert main(["export", str(tmp_path / "run"), str(out), *words]) == 0
        assert (out / file).is_file()
        assert "# run, epoch 0" in (out / "README.md").read_text()


def test_merging_says_what_bfloat16_loses(tiny_sd3, tmp_path, capsys):
    """A change of half a unit in the last place of most weights is mostly rounded away."""
    engine = Engine(tiny_config(tiny_sd3, tmp_path / "run", model={"dtype": "bfloat16"}))
    weights = moved(engine, scale=0.004)
    engine.export(tmp_path / "out", style="merged")
    before, after = (
        SD3Transformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16).state_dict()
        for folder in (tiny_sd3, tmp_path / "out")
    )
    error = size = 0.0
    for name, a in weights.items():
        if "lora_A" in name:
            layer = name.removesuffix(".lora_A.default.weight") + ".weight"
            wanted = 2.0 * weights[name.replace("lora_A", "lora_B")].double() @ a.double()
            error += (after[layer].double() - before[layer].double() - wanted).square().sum().item()
            size += wanted.square().sum().item()
    lost = (error / size) ** 0.5
    assert lost > 0.1
    assert f"whose change is {lost:.1%} off the LoRA's" in capsys.readouterr().out


def test_a_quantised_run_is_not_merged(tiny_sd3, tmp_path):
    model = load_model(tiny_config(tiny_sd3, tmp_path / "run", model={"quantize": "nf4"}), CPU)
    with pytest.raises(UsageError, match="style merged: the LoRA was trained on weights in nf4"):
        model.export(tmp_path / "out", dict(model.trained_parameters()), style="merged")


def test_an_export_that_loads_wrong_is_refused(config, tmp_path, monkeypatch):
    engine = Engine(config)
    moved(engine)
    monkeypatch.setattr(
        "fdfo_engine.models.pipeline_model.fold_alpha", lambda weights, scale: weights
    )  # the alpha is lost
    with pytest.raises(CheckpointError, match="loaded back"):
        engine.export(tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_lora_is_not_written_for_a_pipeline_that_loads_none(config, tmp_path):
    model = load_model(config, CPU)
    model.pipeline_class = DiffusionPipeline
    with pytest.raises(UsageError, match="style diffusers: a DiffusionPipeline loads no LoRA; takes merged"):
        model.export(tmp_path / "out", dict(model.trained_parameters()))
    assert not (tmp_path / "out").exists()


def test_a_lost_adapter_is_noticed_in_bfloat16(tiny_sd3, tmp_path, monkeypatch):
    """It moves the velocity by less than bfloat16 rounds."""
    engine = Engine(tiny_config(tiny_sd3, tmp_path / "run", model={"dtype": "bfloat16"}))
    moved(engine, scale=0.01)
    engine.export(tmp_path / "right")
    save = StableDiffusion3Pipeline.save_lora_weights

    def save_zeros(folder, transformer_lora_layers):
        zeros = {name: torch.zeros_like(weight) for name, weight in transformer_lora_layers.items()}
        save(folder, transformer_lora_layers=zeros)

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_lora_weights", save_zeros)
    with pytest.raises(CheckpointError, match=r"loaded back, .* is off by"):
        engine.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_leaves_foreign_files_alone(config, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    engine = Engine(config)
    moved(engine)
    monkeypatch.setattr("fdfo_engine.models.pipeline_model.fold_alpha", lambda weights, scale: weights)
    with pytest.raises(UsageError, match="is not empty; choose another folder or pass overwrite=True"):
        engine.export(tmp_path / "out")
    with pytest.raises(CheckpointError, match="loaded back"):
        engine.export(tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    engine.export(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(tiny_sd3, tmp_path, train):
    gradients = []
    for on in (False, True):
        model = load_model(tiny_config(tiny_sd3, tmp_path, model={"train": train, "gradient_checkpointing": on}), CPU)
        model.network.train()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from B = 0, where half of the gradients vanish
            for _, p in model.trained_parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator)
        x = torch.randn(3, *model.latent_shape, generator=generator)
        rows = model.encode_prompt(PROMPTS[0]).rows(torch.zeros(3, dtype=torch.int64))
        model.velocity(model.network, x, torch.tensor([900.0, 500.0, 10.0]), rows).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.trained_parameters()})
    plain, checkpointed = gradients
    assert {n for n, g in plain.items() if g is None} == {n for n, g in checkpointed.items() if g is None}
    for name, gradient in plain.items():
        if gradient is not None:
            assert largest(gradient - checkpointed[name]) <= 1e-6 * largest(gradient), name


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"height": 24 + 16}, UsageError, "model.height = 40: this model takes a multiple of 4 up to 32"),
        ({"width": 8 * 512}, UsageError, "model.width = 4096"),
        ({"id": "/nowhere/at/all"}, EnvironmentProblem, "model.id"),
        ({"family": "sd33"}, UsageError, "did you mean 'sd3'"),
        ({"family": "no_such_module:Thing"}, UsageError, "no_such_module"),
    ],
)
def test_a_model_that_cannot_run_is_refused(tiny_sd3, tmp_path, section, error, message):
    with pytest.raises(error, match=message):
        load_model(tiny_config(tiny_sd3, tmp_path, model=section), CPU)


def test_embedded_guidance_is_refused(tiny_sd3, tmp_path):
    with pytest.raises(UsageError, match="embedded_guidance"):
        load_model(tiny_config(tiny_sd3, tmp_path, sampling={"embedded_guidance": 3.5}), CPU)


def test_a_comfyui_export_adds_the_same_to_each_weight(tiny_sd3, tmp_path):
    """Also with the second attention, which only SD3.5-M has."""
    tiny = checks.Tiny(tiny_sd3, None, None, {"lora": {"targets": ["attn.to_k", "attn.add_v_proj", "attn2.to_out.0"]}})
    engine, _, tensors = checks.comfyui_export(tiny, tmp_path)
    exact = checks.changes(engine.trainer.weights(), scale=2.0)
    blocks = ("joint_blocks_{}_x_block_attn_qkv", "joint_blocks_{}_context_block_attn_qkv")
    wanted = {name.format(b) for name in blocks for b in (0, 1)} | {"joint_blocks_0_x_block_attn2_proj"}
    assert {name.split(".")[0].removeprefix("lora_unet_") for name in tensors} == wanted
    rows = checks.native_change(tensors, "joint_blocks_1_x_block_attn_qkv").chunk(3)
    keys = exact["transformer_blocks.1.attn.to_k"]
    assert largest(rows[0]) == largest(rows[2]) == 0
    assert largest(rows[1] - keys) < 1e-6 * largest(keys)
    out = exact["transformer_blocks.0.attn2.to_out.0"]
    assert largest(checks.native_change(tensors, "joint_blocks_0_x_block_attn2_proj") - out) < 1e-6 * largest(out)


class Checkpoint(dict):
    """An original checkpoint whose other weights are zero."""

    def __missing__(self, key):
        return torch.zeros(6, 1)

    def pop(self, key):
        return super().pop(key, self[key])


def test_diffusers_reads_the_original_names_as_meant(tiny_sd3, tmp_path):
    """Its conversion of original checkpoints, applied to what the adapter adds to each weight."""
    engine, _, tensors = checks.comfyui_export(checks.Tiny(tiny_sd3, None, None, {}), tmp_path)
    exact = checks.changes(engine.trainer.weights(), scale=2.0)
    original = Checkpoint()
    for block in (0, 1):
        for layer in ("x_block.attn.qkv", "x_block.attn.proj", "context_block.attn.qkv", "context_block.attn.proj"):
            key = f"joint_blocks_{block}_{layer.replace('.', '_')}"
            if f"lora_unet_{key}.alpha" in tensors:
                original[f"joint_blocks.{block}.{layer}.weight"] = checks.native_change(tensors, key)
    found = convert_sd3_transformer_checkpoint_to_diffusers(original)
    for name, change in exact.items():
        assert largest(found[f"{name}.weight"] - change) < 1e-6 * largest(change), name


def test_a_comfyui_export_that_cannot_be_right_is_refused(tiny_sd3, tmp_path, monkeypatch):
    checks.check_comfyui_refusals(checks.Tiny(tiny_sd3, None, None, {}), tmp_path, monkeypatch, "ff.net.2")
