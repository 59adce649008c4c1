"""Prompts that are longer than a text encoder reads are counted rightly, and told once, from a cache too."""

import pytest
import torch
import yaml
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline
from family_checks import CPU, Tiny
from tiny_flux import build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image
from tiny_sd3 import PROMPTS, tiny_config, tiny_tree

from fdfo_engine.cli.main import main
from fdfo_engine.config import load_config
from fdfo_engine.loop import run
from fdfo_engine.models.prompt_cache import PromptCache
from fdfo_engine.models.prompt_store import open_prompt_store
from fdfo_engine.models.registry import load_model


@pytest.fixture(scope="module")
def families(tiny_sd3, tmp_path_factory):
    build = tmp_path_factory.mktemp
    return {
        "sd3": Tiny(tiny_sd3, StableDiffusion3Pipeline, None, {}),
        "flux": Tiny(build_tiny_flux(build("flux")), FluxPipeline, None, {"sampling": {"embedded_guidance": 2.0}}),
        "qwen": Tiny(build_tiny_qwen_image(build("qwen")), QwenImagePipeline, None, {}),
    }


@pytest.mark.parametrize(("family", "t5_from"), [("sd3", 77), ("flux", 0)])
def test_a_prompt_counts_as_cut_where_its_end_is_not_read(families, tmp_path, family, t5_from):
    """Where another last letter changes nothing of what this encoder gives."""
    model = load_model(families[family].config(tmp_path), CPU)
    given = {
        "CLIP": lambda rows: rows.tensors["pooled_projections"],
        "T5": lambda rows: rows.tensors["encoder_hidden_states"][:, t5_from:],
    }
    limits = model.token_limits()
    assert [(limit.reader, limit.most) for limit in limits] == [("CLIP", 77), ("T5", 16)]
    for limit in limits:
        letters = next(n for n in range(100) if limit.count(["a" * n]) == [limit.most])
        for count, is_read in ((letters, True), (letters + 1, False)):
            one, other = (given[limit.reader](model.encode_prompt("a" * (count - 1) + end)) for end in "ab")
            assert torch.equal(one, other) != is_read


def test_qwen_images_tokens_stand_behind_the_templates_prefix(families, tmp_path):
    """As many as the pipeline gives where nothing is cut, of a prompt with braces too."""
    model = load_model(families["qwen"].config(tmp_path, model={"max_sequence_length": 128}), CPU)
    (limit,) = model.token_limits()
    for prompt in ("", "a cat", "{a} red {circle}", "q" * 90):
        assert limit.count([prompt]) == [int(model.encode_prompt(prompt).tensors["encoder_hidden_states_mask"].sum())]
    assert limit.most == 128


def test_the_longest_and_how_many_are_told_once_from_the_cache_too(tiny_sd3, tmp_path, capfd):
    config = tiny_config(tiny_sd3, tmp_path, model={"prompt_cache": str(tmp_path / "cache")})
    model = load_model(config, CPU)
    prompts = ["a cat", "b" * 30, "c" * 90, "b" * 30]
    line = "2 of 3 prompts are cut: T5 reads 16 tokens (model.max_sequence_length); the longest has 92: '" + "c" * 60
    capfd.readouterr()
    for _ in range(2):  # encoded, then read back
        cache = PromptCache(model, open_prompt_store(config, CPU))
        cache.encode(prompts)
        told = capfd.readouterr().err
        assert told.count(" prompts are cut: ") == 2
        assert line in told
        assert "1 of 3 prompts are cut: CLIP reads 77 tokens; the longest has 92" in told
        cache.warm(prompts)
        cache.encode(prompts[:1])
        assert capfd.readouterr().err == ""


def test_a_run_looks_at_its_whole_list_and_generate_at_its_own(tiny_sd3, tmp_path, capfd):
    tree = tiny_tree(tiny_sd3, tmp_path / "run", run={"epochs": 1})
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "d" * 20, "e" * 18, "f" * 14]))
    tree["prompts"]["source"] = str(tmp_path / "prompts.txt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run(load_config(tmp_path / "config.yaml"))
    told = [line for line in capfd.readouterr().err.splitlines() if "are cut" in line]
    assert len(told) == 1
    assert "2 of 7 prompts are cut: T5 reads 16 tokens" in told[0]
    words = ["--prompt", "g" * 40, "--prompt", "a cat", "--out", str(tmp_path / "out")]
    assert main(["generate", str(tmp_path / "run"), *words]) == 0
    assert capfd.readouterr().err.count("1 of 2 prompts are cut") == 1


def test_without_t5_only_clip_cuts(tiny_sd3, tmp_path):
    model = load_model(tiny_config(tiny_sd3, tmp_path, model={"max_sequence_length": 0}), CPU)
    assert [(limit.reader, limit.most) for limit in model.token_limits()] == [("CLIP", 77)]
