import pytest
import torch

from fdfo_engine.shapes.evaluate import evaluate, sample_pictures
from fdfo_engine.shapes.pipeline import build_pipeline, encode_captions, load_pipeline, save_pipeline, shapes_base
from fdfo_engine.shapes.scene import WORDS, captions

MAX_BYTES = 5_000_000


@pytest.fixture(scope="module")
def fresh():
    return build_pipeline(seed=3)


@pytest.fixture(scope="module")
def base():
    return load_pipeline(shapes_base())


def weights(pipe):
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}


def test_words_are_single_tokens_and_others_do_not_crash(fresh):
    for tokenizer in (fresh.tokenizer, fresh.tokenizer_2):
        assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)
        assert len(tokenizer("an iridescent CIRCLE, 12 times", truncation=True).input_ids) <= 12


def test_longest_caption_fits(fresh):
    lengths = [len(fresh.tokenizer(text).input_ids) for text in captions("train", 2000, seed=0)]
    assert max(lengths) <= fresh.tokenizer.model_max_length


def test_encodes_as_diffusers_does(fresh):
    texts = ["a red circle", "", "two blue circles and a green square"]
    hidden, _, pooled, _ = fresh.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    ours = encode_captions(fresh, texts)
    torch.testing.assert_close(ours[0], hidden, rtol=0, atol=0)
    torch.testing.assert_close(ours[1], pooled, rtol=0, atol=0)
    assert not torch.equal(pooled[0], pooled[2])


def test_build_repeats_and_leaves_the_random_state(fresh):
    before = torch.get_rng_state()
    again = weights(build_pipeline(seed=3))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, again[name]) for name, value in weights(fresh).items())


def test_saves_and_loads(fresh, tmp_path):
    before = {name: value.clone() for name, value in weights(fresh).items()}
    save_pipeline(fresh, tmp_path / "saved")
    after, loaded = weights(fresh), weights(load_pipeline(tmp_path / "saved"))
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
        assert loaded[name].dtype == value.dtype
        assert torch.equal(value.half().to(value.dtype), loaded[name]), name


def test_diffusers_call_gives_an_image(base):
    base.set_progress_bar_config(disable=True)
    image = base("a red circle", max_sequence_length=0, num_inference_steps=2, guidance_scale=1.0).images[0]
    assert image.size == (64, 64)


def test_sampling_follows_the_diffusers_loop(base):
    base.set_progress_bar_config(disable=True)
    texts = ["a red circle", "two blue circles"]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    theirs = base(
        texts, max_sequence_length=0, num_inference_steps=4, guidance_scale=1.0, latents=noise, output_type="pt"
    ).images
    torch.testing.assert_close(sample_pictures(base, texts, steps=4, seed=9), theirs, rtol=0, atol=1e-4)


def test_base_is_small_and_safe():
    files = [path for path in shapes_base().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".txt", ".md"}


def test_base_draws_captions(base):
    quality = evaluate(base, captions("heldout", 64, seed=21), steps=8, seed=22)
    assert quality.score >= 0.75
    assert quality.strict >= 0.35
