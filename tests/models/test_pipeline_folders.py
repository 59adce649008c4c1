"""Folders and files that people bring: which are taken, and what is said of the others."""

import json
import re
import shutil

import diffusers
import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file, save_file
from tiny_flux import build_tiny_flux
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.models.registry import load_model
from fdfo_engine.planning.footprint import blank_footprint
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

CPU = torch.device("cpu")
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(tiny_sd3, tmp_path):
    """A copy of the tiny SD3 to change."""
    return shutil.copytree(tiny_sd3, tmp_path / "base")


def rewrite(file, change):
    """Saves what `change` makes of the tensors of `file`."""
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def named(folder, run_dir, **model):
    """Settings whose model is `folder`, which may be no folder at all."""
    return tiny_config(run_dir.parent, run_dir, model={"id": str(folder), **model})


def weights_of(model):
    return {name: weight for name, weight in model.named_weights() if "lora_" not in name}


def as_variant(folder, parts, variant="fp16"):
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_suffix(f".{variant}.safetensors"))


ALL = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.mark.parametrize("parts", [ALL, ("transformer",), ("text_encoder", "vae")])
def test_files_of_a_variant_are_taken_where_they_are_asked_for(tiny_sd3, base, tmp_path, parts):
    as_variant(base, parts)
    with pytest.raises(EnvironmentProblem, match=f"model.variant = None: .*{min(parts)} .*set model.variant: fp16"):
        load_model(tiny_config(base, tmp_path / "run"), CPU)
    with pytest.raises(EnvironmentProblem, match=r"model.variant = bf16: .*of variant fp16 only"):
        load_model(tiny_config(base, tmp_path / "run", model={"variant": "bf16"}), CPU)
    found = load_model(tiny_config(base, tmp_path / "run", model={"variant": "fp16"}), CPU)
    exact = weights_of(load_model(tiny_config(tiny_sd3, tmp_path / "run"), CPU))
    assert all(torch.equal(weight, exact[name]) for name, weight in weights_of(found).items())


def test_a_variant_beside_plain_files_is_chosen_and_an_absent_one_refused(tiny_sd3, base, tmp_path):
    shutil.copy(base / TRANSFORMER, base / "transformer/diffusion_pytorch_model.half.safetensors")
    rewrite(base / "transformer/diffusion_pytorch_model.half.safetensors", lambda t: {n: w / 2 for n, w in t.items()})
    plain = load_model(tiny_config(base, tmp_path / "run"), CPU).network.proj_out.weight
    half = load_model(tiny_config(base, tmp_path / "run", model={"variant": "half"}), CPU).network.proj_out.weight
    assert torch.equal(half, plain / 2)
    with pytest.raises(EnvironmentProblem, match=r"model.variant = fp16: .* has no weights of it"):
        load_model(tiny_config(tiny_sd3, tmp_path / "run", model={"variant": "fp16"}), CPU)


@pytest.mark.parametrize("style", ["diffusers", pytest.param("merged", marks=pytest.mark.slow)])
def test_a_run_on_a_variant_exports(base, tmp_path, style):
    as_variant(base, ALL)
    engine = Engine(tiny_config(base, tmp_path / "run", model={"variant": "fp16"}))
    engine.export(tmp_path / "out", style=style)
    if style == "merged":  # a plain folder, which anybody loads
        StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")


def test_weights_in_many_files_in_other_dtypes_or_in_bin_files_are_the_same_model(tiny_sd3, base, tmp_path):
    SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer").save_pretrained(
        tmp_path / "cut", max_shard_size="20KB"
    )
    shutil.rmtree(base / "transformer")
    shutil.move(tmp_path / "cut", base / "transformer")
    assert len(list((base / "transformer").glob("*.safetensors"))) > 3
    rewrite(base / "vae/diffusion_pytorch_model.safetensors", lambda t: {n: w.double() for n, w in t.items()})
    encoder = base / "text_encoder/model.safetensors"
    torch.save(load_file(encoder), base / "text_encoder/pytorch_model.bin")
    encoder.unlink()
    found, exact = (weights_of(load_model(tiny_config(f, tmp_path / "run"), CPU)) for f in (base, tiny_sd3))
    assert found.keys() == exact.keys()
    assert all(torch.equal(weight, exact[name]) and weight.dtype == torch.float32 for name, weight in found.items())


def test_a_transformer_in_float8_is_read_into_the_models_dtype(base, tmp_path):
    rewrite(base / TRANSFORMER, lambda t: {n: w.to(torch.float8_e4m3fn) for n, w in t.items()})
    network = load_model(tiny_config(base, tmp_path / "run"), CPU).network
    assert torch.equal(network.proj_out.weight, load_file(base / TRANSFORMER)["proj_out.weight"].float())


@pytest.mark.parametrize("part", ["vae", "transformer", "scheduler", "tokenizer_2", "text_encoder"])
def test_a_missing_part_is_named(base, tmp_path, part):
    shutil.rmtree(base / part)
    for load in (lambda c: load_model(c, CPU), blank_footprint):
        with pytest.raises(EnvironmentProblem, match=f"its part {part} is missing"):
            load(tiny_config(base, tmp_path / "run"))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_the_index_leaves_empty_is_named(base, tmp_path, part):
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, part: [None, None]}))
    with pytest.raises(EnvironmentProblem, match=rf"model_index\.json names no {part}, which is needed"):
        load_model(tiny_config(base, tmp_path / "run"), CPU)


@pytest.mark.parametrize(
    ("file", "weight"),
    [
        (TRANSFORMER, "proj_out.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        ("text_encoder/model.safetensors", "text_projection.weight"),  # transformers would draw it at random
    ],
)
def test_a_weight_that_the_files_lack_is_named(base, tmp_path, file, weight):
    rewrite(base / file, lambda tensors: {name: w for name, w in tensors.items() if name != weight})
    with pytest.raises(EnvironmentProblem, match=f"the files of its part {file.split('/')[0]} lack {weight}"):
        load_model(tiny_config(base, tmp_path / "run"), CPU)


def test_a_file_of_weights_is_told_how_to_become_a_folder(tiny_sd3, tmp_path):
    cases = {
        "flux1-dev.safetensors": "FluxTransformer2DModel",
        "sd3.5_medium.safetensors": "SD3Transformer2DModel",
        "qwen-image-Q4_K_M.gguf": "QwenImageTransformer2DModel",
        "stable-diffusion-3-fine-tune.ckpt": "SD3Transformer2DModel",
    }
    for name, transformer in cases.items():
        file = tmp_path / name
        file.write_bytes(b"")
        for load in (lambda c: load_model(c, CPU), blank_footprint):
            with pytest.raises(EnvironmentProblem, match="takes the folder of a diffusers pipeline") as caught:
                load(named(file, tmp_path / "run"))
        require_snippet(str(caught.value), transformer, str(file))
        assert ("GGUFQuantizationConfig" in str(caught.value)) == name.endswith(".gguf")


def require_snippet(message, transformer, source):
    """The last three lines are Python that names what diffusers has, and `source`."""
    lines = message.splitlines()[-3:]
    compile("\n".join(lines), "snippet", "exec")
    for name in re.findall(r"diffusers\.(\w+)", "\n".join(lines)):
        assert hasattr(diffusers, name), name
    assert f"diffusers.{transformer}.from_" in lines[1]
    assert f'"{source}"' in lines[1]
    assert lines[2].endswith('.save_pretrained("FOLDER")')


def test_a_file_is_known_by_its_tensors_where_its_name_says_nothing(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}, file)
    with pytest.raises(EnvironmentProblem) as caught:
        load_model(named(file, tmp_path / "run"), CPU)
    require_snippet(str(caught.value), "SD3Transformer2DModel", str(file))


@pytest.mark.parametrize(
    ("model_id", "source"),
    [
        ("owner/flux-tune/v2/model.safetensors", "https://huggingface.co/owner/flux-tune/blob/main/v2/model.safetensors"),
        ("https://huggingface.co/o/n/blob/main/x.safetensors", "https://huggingface.co/o/n/blob/main/x.safetensors"),
    ],
)  # fmt: skip
def test_a_file_of_the_hub_is_told_too(tmp_path, model_id, source):
    with pytest.raises(EnvironmentProblem) as caught:
        load_model(named(model_id, tmp_path / "run"), CPU)
    require_snippet(str(caught.value), "FluxTransformer2DModel", source)


def test_a_file_that_is_not_there_is_no_advice(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"no such file; takes the folder of a diffusers pipeline$"):
        load_model(named(tmp_path / "flux.safetensors", tmp_path / "run"), CPU)


def test_other_folders_are_told_apart(tiny_sd3, tmp_path):
    with pytest.raises(EnvironmentProblem, match="a transformer alone") as caught:
        load_model(named(tiny_sd3 / "transformer", tmp_path / "run"), CPU)
    require_snippet(str(caught.value), "SD3Transformer2DModel", str(tiny_sd3 / "transformer"))
    cached = tmp_path / "models--owner--name"  # what lies in the hub's cache
    shutil.copytree(tiny_sd3, cached / "snapshots/0123abcd")
    with pytest.raises(EnvironmentProblem, match=r"there is one in .*snapshots/0123abcd"):
        load_model(named(cached, tmp_path / "run"), CPU)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match="a folder with a LoRA"):
        load_model(named(lora, tmp_path / "run"), CPU)
    (lora / "pytorch_lora_weights.safetensors").rename(lora / "flux-tune.safetensors")
    with pytest.raises(EnvironmentProblem, match=r"a folder without model_index\.json; takes") as caught:
        load_model(named(lora, tmp_path / "run"), CPU)
    require_snippet(str(caught.value), "FluxTransformer2DModel", str(lora / "flux-tune.safetensors"))


@pytest.mark.parametrize("method", ["torchao", "quanto", "gguf", "bitsandbytes"])
def test_other_packings_are_refused(base, tmp_path, method):
    config = json.loads((base / "transformer/config.json").read_text())
    packed = {"quant_method": method, "load_in_8bit": True, "load_in_4bit": False}
    (base / "transformer/config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    for load in (lambda c: load_model(c, CPU), blank_footprint):
        with pytest.raises(UsageError, match=f"its transformer is quantised: .*{method}; takes four bits of bits"):
            load(tiny_config(base, tmp_path / "run"))


BUILDERS = {"sd3": (None, SD3Transformer2DModel), "flux": (build_tiny_flux, FluxTransformer2DModel)}


@pytest.fixture(scope="module", params=BUILDERS)
def packed(request, tiny_sd3, tmp_path_factory):
    """A pipeline whose transformer lies in four bits."""
    build, kind = BUILDERS[request.param]
    plain = tiny_sd3 if build is None else build(tmp_path_factory.mktemp("plain"))
    folder = tmp_path_factory.mktemp("packed") / "base"
    shutil.copytree(plain, folder)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        on_a_cpu(patch)
        network = kind.from_pretrained(plain / "transformer", quantization_config=how, dtype=torch.bfloat16)
    shutil.rmtree(folder / "transformer")
    network.save_pretrained(folder / "transformer")
    return folder


def on_a_cpu(patch):
    """bitsandbytes computes there too; only diffusers' loader insists on a GPU."""
    patch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *a, **k: None)
    patch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, given: given or {"": "cpu"})


def test_a_packed_transformer_trains_and_exports(packed, tmp_path, monkeypatch):
    on_a_cpu(monkeypatch)
    engine = Engine(tiny_config(packed, tmp_path / "run", model={"dtype": "bfloat16"}))
    assert engine.model.dtype == torch.bfloat16
    rollout = engine.rollout(PROMPTS)
    assert rollout.velocities.dtype == torch.bfloat16
    metrics = engine.update(rollout, REWARDS)
    assert metrics["optimizer_steps"] == 2
    assert metrics["grad_norm"] > 0
    for style in ("diffusers", "comfyui"):
        engine.export(tmp_path / style, style=style)
    with pytest.raises(UsageError, match=r"style merged: .*four bits of bitsandbytes, .* takes diffusers or comfyui"):
        engine.export(tmp_path / "merged", style="merged")


def test_what_packed_weights_do_not_take_is_refused(packed, tmp_path):
    cases = [
        ({"model": {"quantize": "nf4"}}, r"model\.quantize = nf4; set that to null"),
        ({"zero": {"stage": 3}}, r"zero\.stage = 3; .* takes a lower stage"),
        ({"model": {"train": "full"}}, r"model\.train = full; .* takes lora"),
    ]
    for sections, message in cases:
        with pytest.raises(UsageError, match=message):
            load_model(tiny_config(packed, tmp_path / "run", **sections), CPU)
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentProblem, match=r"model\.id = .*GPU"):
            load_model(tiny_config(packed, tmp_path / "run"), CPU)


@pytest.mark.slow
def test_a_plan_counts_packed_files_as_weights_packed_here(tiny_sd3, base, tmp_path):
    config = json.loads((base / "transformer/config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "transformer/config.json").write_text(json.dumps({**config, "quantization_config": packed}))
    found = blank_footprint(tiny_config(base, tmp_path / "run"))
    assert found == blank_footprint(tiny_config(tiny_sd3, tmp_path / "run", model={"quantize": "nf4"}))
