"""Embeddings on disk: the same bits without a text encoder, in another process, and nothing from a damaged file."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine.config import dump_config
from fdfo_engine.models.flow_model import Conditioning
from fdfo_engine.models.prompt_cache import PromptCache
from fdfo_engine.models.prompt_store import PromptStore, open_prompt_store
from fdfo_engine.models.registry import load_model

CPU = torch.device("cpu")

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # an engine leaves them behind

SECOND_PROCESS = """
import sys, torch
from safetensors.torch import save_file
from fdfo_engine import Engine, load_config
config = load_config(sys.argv[1])
engine = Engine(config)
def refuse(prompt): raise AssertionError(f"encoded {prompt!r}")
engine.model.encode_prompt = refuse
save_file(engine.sampler.conditioning(sys.argv[3:])[0].tensors, sys.argv[2])
"""


def row(value, count=100):
    return Conditioning({"tokens": torch.full((1, count), float(value)), "pooled": torch.randn(1, 3).bfloat16()})


def same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    assert all(t.dtype == other.tensors[n].dtype and t.equal(other.tensors[n]) for n, t in one.tensors.items())


@pytest.mark.slow
def test_a_second_process_gets_the_same_bits_and_encodes_nothing(tiny_sd3, tmp_path):
    settings = {"prompt_cache": str(tmp_path / "prompts")}
    config = tiny_config(tiny_sd3, tmp_path / "run", model=settings)
    model = load_model(config, CPU)
    with torch.no_grad():
        exact = Conditioning.cat([model.encode_prompt(prompt) for prompt in PROMPTS])
    same(PromptCache(model, open_prompt_store(config, CPU)).encode(PROMPTS), exact)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    words = [str(tmp_path / "config.yaml"), str(tmp_path / "out.safetensors"), *PROMPTS]
    alone = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    command = [sys.executable, "-c", SECOND_PROCESS, *words]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    save_file(exact.tensors, tmp_path / "exact.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "exact.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_told_and_encoded_again(tmp_path, capsys, damage):
    store = PromptStore(tmp_path, "it", 1 << 20)
    store.save("a", row(1))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes({"cut": data[:-20], "flip": data, "empty": b""}[damage])
    assert store.load("a") is None
    assert "damaged" in capsys.readouterr().err
    again = row(2)
    store.save("a", again)
    same(store.load("a"), again)


def test_the_least_recently_used_goes_first(tmp_path):
    size = len(row(0).tensors["tokens"][0]) * 4
    store = PromptStore(tmp_path, "it", 5 * size)
    for i in range(3):
        store.save(str(i), row(i))
    store.load("0")
    for i in range(3, 5):
        store.save(str(i), row(i))
    kept = {str(i) for i in range(5) if store.load(str(i)) is not None}
    assert "0" in kept
    assert "4" in kept
    assert "1" not in kept
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5 * size


def test_what_the_bits_depend_on_is_in_the_name(tiny_sd3, tmp_path):
    base = {"prompt_cache": str(tmp_path / "prompts")}
    changes = [{}, {"dtype": "bfloat16"}, {"max_sequence_length": 8}]
    stores = [open_prompt_store(tiny_config(tiny_sd3, tmp_path, model=base | change), CPU) for change in changes]
    stores[0].save("a", row(1))
    assert [store.load("a") is not None for store in stores] == [True, False, False]
    assert open_prompt_store(tiny_config(tiny_sd3, tmp_path, model={"prompt_cache": False}), CPU) is None


def test_other_weights_in_the_same_folder_are_another_encoder(tiny_sd3, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(tiny_sd3, folder)
    config = tiny_config(folder, tmp_path / "run", model={"prompt_cache": str(tmp_path / "prompts")})
    open_prompt_store(config, CPU).save("a", row(1))
    assert open_prompt_store(config, CPU).load("a") is not None
    weights = next((folder / "text_encoder_2").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert open_prompt_store(config, CPU).load("a") is None


def test_storage_that_fails_costs_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    store = PromptStore(tmp_path / "file", "it", 1 << 20)
    store.save("a", row(1))
    store.save("b", row(2))
    assert capsys.readouterr().err.count("keeps no more embeddings") == 1
    assert store.load("a") is None
