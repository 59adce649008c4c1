"""What belongs to a base model's identity: all that its outputs depend on, and nothing else."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from fake_hub import publish, use_cache
from safetensors.torch import load_file, save_file
from tiny_sd3 import PROMPTS, build_tiny_sd3, tiny_config
from transformers import CLIPTextModelWithProjection

from fdfo_engine.models.base_files import base_files, text_files
from fdfo_engine.models.prompt_store import open_prompt_store
from fdfo_engine.models.registry import load_model, locate_base
from fdfo_engine.runtime.errors import EnvironmentProblem

CPU = torch.device("cpu")
TRANSFORMER = "transformer/diffusion_pytorch_model"
SHARD = f"{TRANSFORMER}-{{:05d}}-of-00002.safetensors"


@pytest.fixture
def base(tiny_sd3, tmp_path):
    """A copy of a tiny pipeline that a test may change."""
    return shutil.copytree(tiny_sd3, tmp_path / "base")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=3))


def scaled(file, factor=1.25):
    weights = {name: factor * weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def shard(folder, factor=1.0):
    """Beside the transformer's single file the same weights in two, and their index."""
    weights = {name: factor * w for name, w in load_file(folder / f"{TRANSFORMER}.safetensors").items()}
    places = {name: SHARD.format(1 + i % 2).split("/")[1] for i, name in enumerate(weights)}
    for place in set(places.values()):
        part = {name: weights[name] for name in weights if places[name] == place}
        save_file(part, folder / "transformer" / place, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{TRANSFORMER}.safetensors.index.json").write_text(json.dumps(index))


def test_hashes_are_those_of_the_files(base):
    found = base_files(base)
    weights = [name for name in found if name.endswith(".safetensors")]
    assert len(weights) == 5, "transformer, VAE and three text encoders"
    for name in [*weights, "tokenizer_3/tokenizer.json"]:
        data = (base / name).read_bytes()
        assert (found[name].size, found[name].sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(found) == {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} - {"prompts.txt"}


OUTPUTS_CHANGE = {
    "weights of the transformer": lambda f: scaled(f / f"{TRANSFORMER}.safetensors"),
    "decoder": lambda f: scaled(f / "vae/diffusion_pytorch_model.safetensors"),
    "text encoder": lambda f: scaled(f / "text_encoder_3/model.safetensors"),
    "shift of the scheduler": lambda f: edit(f / "scheduler/scheduler_config.json", shift=2.0),
    "scale of the latents": lambda f: edit(f / "vae/config.json", scaling_factor=1.0),
    "T5 left out": lambda f: edit(f / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None]),
    "activation of an encoder": lambda f: edit(f / "text_encoder/config.json", hidden_act="gelu"),
    "special tokens": lambda f: edit(f / "tokenizer/tokenizer_config.json", pad_token="a"),
    "tokenizer": lambda f: edit(f / "tokenizer_3/tokenizer.json", truncation=None, more=1),
    "an adapter beside an encoder": lambda f: (f / "text_encoder/adapter_config.json").write_text('{"r": 4}'),
    "another scheduler": lambda f: edit(
        f / "model_index.json", scheduler=["diffusers", "FlowMatchHeunDiscreteScheduler"]
    ),
    "quantised": lambda f: edit(f / "transformer/config.json", quantization_config={"quant_method": "bitsandbytes"}),
    "an index, which comes before the single file": shard,
}

NOTHING_CHANGES = {
    "README": lambda f: (f / "README.md").write_text("# new"),
    "card of a part": lambda f: (f / "transformer/README.md").write_text("# new"),
    ".gitattributes": lambda f: (f / ".gitattributes").write_text("*.safetensors filter=lfs"),
    "download records": lambda f: (f / ".cache/huggingface").mkdir(parents=True),
    "hidden files of a tokenizer": lambda f: (f / "tokenizer/.DS_Store").write_text("x"),
    "licence": lambda f: (f / "tokenizer/LICENSE.txt").write_text("free"),
    "single-file weights at the root": lambda f: (f / "sd3.5_medium.safetensors").write_bytes(b"x"),
    "a variant that is not loaded": lambda f: (f / f"{TRANSFORMER}.fp16.safetensors").write_bytes(b"x"),
    "pickles beside safetensors": lambda f: (f / "text_encoder/pytorch_model.bin").write_bytes(b"x"),
    "flax weights": lambda f: (f / "vae/diffusion_flax_model.msgpack").write_bytes(b"x"),
    "shards without an index": lambda f: (f / SHARD.format(1)).write_bytes(b"x"),
    "another folder": lambda f: (f / "unet").mkdir() or (f / "unet/config.json").write_text("{}"),
    "the version that wrote the index": lambda f: edit(f / "model_index.json", _diffusers_version="0.99"),
    "where it was": lambda f: edit(f / "transformer/config.json", _name_or_path="/somewhere/else"),
    "the version of transformers": lambda f: edit(f / "text_encoder/config.json", transformers_version="9"),
    "the order of keys": lambda f: (f / "vae/config.json").write_text(
        json.dumps(dict(reversed(json.loads((f / "vae/config.json").read_text()).items())))
    ),
    "a part that only reads pictures": lambda f: edit(f / "model_index.json", image_encoder=["transformers", "X"]),
    "a part named as absent": lambda f: edit(f / "model_index.json", feature_extractor=[None, None], more=[None, None]),
    "the dates of files": lambda f: os.utime(f / f"{TRANSFORMER}.safetensors", (1, 1)),
    "generation settings": lambda f: (f / "text_encoder_3/generation_config.json").write_text("{}"),
}  # fmt: skip


@pytest.mark.parametrize("change", OUTPUTS_CHANGE.values(), ids=OUTPUTS_CHANGE)
def test_what_outputs_depend_on_is_another_model(base, change):
    before = base_files(base)
    change(base)
    assert base_files(base) != before


@pytest.mark.parametrize("change", NOTHING_CHANGES.values(), ids=NOTHING_CHANGES)
def test_what_nothing_depends_on_is_the_same_model(base, change):
    before = base_files(base)
    change(base)
    assert base_files(base) == before


def test_the_weights_that_count_are_those_that_diffusers_loads(base):
    shard(base, factor=3.0)
    loaded = SD3Transformer2DModel.from_pretrained(base / "transformer").state_dict()
    counted = {name for name in base_files(base) if name.startswith("transformer/")} - {"transformer/config.json"}
    assert counted == {f"{TRANSFORMER}.safetensors.index.json", SHARD.format(1), SHARD.format(2)}
    wanted = load_file(base / SHARD.format(1)) | load_file(base / SHARD.format(2))
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_the_weights_that_count_are_those_that_transformers_loads(base):
    encoder = base / "text_encoder"
    weights = load_file(encoder / "model.safetensors")
    save_file({n: 3 * w for n, w in weights.items()}, encoder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = CLIPTextModelWithProjection.from_pretrained(encoder).state_dict()
    counted = {name for name in base_files(base) if name.startswith("text_encoder/")}
    assert counted == {"text_encoder/config.json", "text_encoder/model.safetensors"}
    assert all(torch.equal(loaded[name], weights[name]) for name in weights if name in loaded)


def test_a_variant_is_what_it_loads(base):
    plain = base_files(base)
    shutil.copy(base / f"{TRANSFORMER}.safetensors", base / f"{TRANSFORMER}.fp16.safetensors")
    found = base_files(base, "fp16")
    assert f"{TRANSFORMER}.fp16.safetensors" in found
    assert f"{TRANSFORMER}.safetensors" not in found
    assert found.keys() - plain.keys() == {f"{TRANSFORMER}.fp16.safetensors"}, "parts without it load as ever"


def test_every_shard_counts(base):
    shard(base)
    before = base_files(base)
    scaled(base / SHARD.format(2))
    assert [n for n in before if base_files(base)[n] != before[n]] == [SHARD.format(2)]
    (base / SHARD.format(2)).unlink()
    with pytest.raises(EnvironmentProblem, match="00002-of-00002"):
        _ = locate_base(tiny_config(base, base / "run")).record


ONLY_TEXT = ("text encoder", "T5 left out", "activation of an encoder", "special tokens", "tokenizer")


@pytest.mark.parametrize("name", OUTPUTS_CHANGE)
def test_embeddings_depend_on_what_encodes(base, name):
    before = text_files(base)
    OUTPUTS_CHANGE[name](base)
    is_of_text = name in (*ONLY_TEXT, "an adapter beside an encoder")
    assert (text_files(base) != before) == is_of_text


def test_stored_embeddings_outlive_another_vae_and_not_another_tokenizer(base, tmp_path):
    config = tiny_config(base, tmp_path / "run", model={"prompt_cache": str(tmp_path / "prompts")})
    with torch.no_grad():
        row = load_model(config, CPU).encode_prompt(PROMPTS[0])
    open_prompt_store(config, CPU).save("a", row)
    scaled(base / "vae/diffusion_pytorch_model.safetensors")
    edit(base / "scheduler/scheduler_config.json", shift=1.0)
    named = config.model_copy(update={"model": config.model.model_copy(update={"family": "sd3"})})
    moved = config.with_base(shutil.copytree(base, tmp_path / "elsewhere"))
    assert all(open_prompt_store(c, CPU).load("a") is not None for c in (config, named, moved))
    edit(base / "tokenizer/tokenizer_config.json", pad_token="a")
    assert open_prompt_store(config, CPU).load("a") is None


def test_a_path_is_no_part_of_it(base, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(base)
    copied = shutil.copytree(base, tmp_path / "copied")
    monkeypatch.chdir(tmp_path)
    places = (base, "base", "./base", tmp_path / "link", copied)
    records = [locate_base(tiny_config(base, tmp_path / "run").with_base(place)).record for place in places]
    assert len({record.sha256 for record in records}) == 1
    assert [record.commit for record in records] == [None] * 5


def test_a_model_of_the_hub_is_what_lies_at_its_commit(base, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    use_cache(monkeypatch, cache)
    first = publish(cache, "me/tiny", base)
    config = tiny_config(base, tmp_path / "run", model={"id": "me/tiny"})
    found = locate_base(config)
    assert (found.source, found.name, found.commit) == (str(first), "me/tiny", first.name)
    assert found.record.files == base_files(base)
    by_path = locate_base(config.with_base(first))
    assert (by_path.name, by_path.commit) == ("me/tiny", first.name)
    (base / "README.md").write_text("# new")
    second = publish(cache, "me/tiny", base)
    readme = locate_base(config)
    assert (readme.commit, readme.record.sha256) == (second.name, found.record.sha256)
    scaled(base / f"{TRANSFORMER}.safetensors")
    publish(cache, "me/tiny", base)
    assert locate_base(config).record.sha256 != found.record.sha256
    pinned = config.model_copy(update={"model": config.model.model_copy(update={"revision": first.name})})
    assert locate_base(pinned).record == found.record


def test_the_model_is_loaded_at_the_commit_that_was_identified(base, tmp_path, monkeypatch):
    """The hub's main may move between the two."""
    cache = tmp_path / "cache"
    use_cache(monkeypatch, cache)
    publish(cache, "me/tiny", base)
    config = tiny_config(base, tmp_path / "run", model={"id": "me/tiny"})
    found = locate_base(config)
    wanted = load_file(base / f"{TRANSFORMER}.safetensors")["proj_out.weight"]
    scaled(base / f"{TRANSFORMER}.safetensors")
    publish(cache, "me/tiny", base)
    assert torch.equal(load_model(config, CPU, found).network.state_dict()["proj_out.weight"], wanted)
    assert torch.equal(load_model(config, CPU).network.state_dict()["proj_out.weight"], 1.25 * wanted)


def test_a_pipeline_without_safetensors(tmp_path):
    folder = build_tiny_sd3(tmp_path / "base")
    before = base_files(folder)
    for name in ("transformer", "vae"):
        file = folder / name / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    found = base_files(folder)
    assert {n for n in found if n not in before} == {f"{n}/diffusion_pytorch_model.bin" for n in ("transformer", "vae")}
