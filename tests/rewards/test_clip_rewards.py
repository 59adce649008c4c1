"""CLIP rewards against transformers' own processor and forward pass, on tiny random models from disk."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.tiny_clip import build_tiny_clip
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fdfo_engine.rewards import build
from fdfo_engine.rewards.clip_inputs import ClipPreprocessing
from fdfo_engine.rewards.pixels import resize_bicubic
from fdfo_engine.runtime.errors import RewardError, UsageError

PROMPTS = ["a red circle", "x", "two small blue squares, left of a very large one. " * 3, "a red circle", "sky"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(build_tiny_clip(tmp_path_factory.mktemp("clip")))


def pictures(count, height=48, width=48):
    """Smooth random pictures of 8 bits: as pillow images and as the tensor a rollout has."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(count))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    pixels = (fine * 255).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels], pixels.float() / 255


def by_transformers(folder, prompts, pil_images, dtype=torch.float32, processor=None):
    """logit_scale * cosine, pair by pair, one at a time: no padding, no batch."""
    model = CLIPModel.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(processor or folder)
    prepare = CLIPImageProcessorPil.from_pretrained(processor or folder)
    scores = []
    for prompt, image in zip(prompts, pil_images, strict=True):
        inputs = tokenizer([prompt], truncation=True, max_length=40, return_tensors="pt")
        pixels = prepare(images=image, return_tensors="pt")["pixel_values"].to(dtype)
        with torch.no_grad():
            scores.append(model(**inputs, pixel_values=pixels).logits_per_image.item())
    return torch.tensor(scores), model.logit_scale.float().exp().item()


@pytest.mark.parametrize(
    ("size", "new_size"),
    [
        ((512, 512), (224, 224)),
        ((30, 51), (22, 38)),
        ((64, 64), (224, 224)),
        ((512, 512), (504, 504)),
        ((9, 7), (9, 7)),
        ((333, 201), (224, 135)),
        ((205, 223), (28, 140)),
        ((86, 295), (14, 242)),
        ((104, 103), (24, 141)),
        ((101, 60), (51, 35)),
        ((101, 60), (50, 35)),
    ],
)
def test_resizing_is_pillows_to_the_bit(size, new_size):
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(new_size[::-1], Image.Resampling.BICUBIC)
    assert torch.equal(resize_bicubic(pixels, *new_size), torch.from_numpy(np.array(theirs)).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(48, 48), (33, 70), (70, 33), (20, 24), (32, 32)])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 36}, "crop_size": {"height": 31, "width": 29}, "image_mean": [0.5, 0.4, 0.3]},
        {"size": {"height": 16, "width": 16}, "do_center_crop": False, "image_std": [1.0, 0.5, 0.25]},
    ],
)
def test_preprocessing_is_the_processors(size, settings):
    pil_images, images = pictures(2, *size)
    processor = CLIPImageProcessorPil(**settings)
    expected = processor(images=pil_images, return_tensors="pt")["pixel_values"]
    prepared = ClipPreprocessing.from_processor(processor.to_dict())(images)
    assert prepared.shape == expected.shape
    assert ((prepared - expected).abs() * 255 * min(processor.image_std)).max() < 1e-3


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_clip_is_transformers_own_score(folder, count, batch_size):
    pil_images, images = pictures(count)
    expected, scale = by_transformers(folder, PROMPTS[:count], pil_images)
    scores = build("clip", {"model": folder, "batch_size": batch_size, "device": "cpu"}, "rewards.0.name")(
        PROMPTS[:count], images
    )
    assert scores.shape == (count,)
    assert scores.dtype == torch.float32
    assert (scores - 100 * expected / scale).abs().max() < 1e-4
    assert count == 1 or scores.std() > 1  # the score tells prompts and images apart


def test_pickscore_takes_the_models_scale_and_another_processor(folder, tmp_path):
    bare = str(build_tiny_clip(tmp_path / "bare", with_processor=False))
    pil_images, images = pictures(3)
    expected, _ = by_transformers(bare, PROMPTS[:3], pil_images, processor=folder)
    scores = build("pickscore", {"model": bare, "processor": folder}, "rewards.0.name")(PROMPTS[:3], images)
    assert (scores - expected).abs().max() < 1e-5


def test_bfloat16_is_near_float32_and_returns_float32(folder):
    _, images = pictures(5)
    exact = build("clip", {"model": folder}, "rewards.0.name")(PROMPTS, images)
    coarse = build("clip", {"model": folder, "dtype": "bfloat16"}, "rewards.0.name")(PROMPTS, images)
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - exact).abs().max() < 4


def test_an_old_models_end_token_is_found(tmp_path):
    """Checkpoints of before 2023 say eos_token_id 2; their text is read at the largest token id."""
    pil_images, images = pictures(2)
    old = str(build_tiny_clip(tmp_path / "old", eos_in_config=2))
    expected, scale = by_transformers(old, PROMPTS[:2], pil_images)
    scores = build("clip", {"model": old}, "rewards.0.name")(PROMPTS[:2], images)
    assert (scores - 100 * expected / scale).abs().max() < 1e-4


def save_head(folder, widths, suffix):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        tensors[f"layers.{2 * number}.weight"] = torch.randn(after, before, generator=generator)
        tensors[f"layers.{2 * number}.bias"] = torch.randn(after, generator=generator)
    save = save_file if suffix == "safetensors" else torch.save
    save(tensors, folder / f"head.{suffix}")
    return tensors


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_aesthetic_is_its_layers_on_the_unit_embedding(folder, tmp_path, suffix):
    tensors = save_head(tmp_path, (24, 10, 6, 1), suffix)
    pil_images, images = pictures(3)
    options = {"model": folder, "head": str(tmp_path), "head_file": f"head.{suffix}", "batch_size": 2}
    scores = build("aesthetic", options, "rewards.0.name")(["any"] * 3, images)
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=pil_images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        values = model.visual_projection(model.vision_model(pixels).pooler_output)
    values = (values / values.norm(dim=-1, keepdim=True)).double()
    for number in (0, 2, 4):
        values = values @ tensors[f"layers.{number}.weight"].double().T + tensors[f"layers.{number}.bias"].double()
    assert (scores - values[:, 0]).abs().max() < 1e-4


def test_a_head_for_another_model_is_refused(folder, tmp_path):
    save_head(tmp_path, (23, 1), "pth")
    reward = build("aesthetic", {"model": folder, "head": str(tmp_path), "head_file": "head.pth"}, "rewards.0.name")
    with pytest.raises(RewardError, match="do not lead from 24 numbers to one"):
        reward(["a"], pictures(1)[1])


def test_a_model_that_is_not_there_stops_the_run(tmp_path):
    reward = build("clip", {"model": str(tmp_path / "none")}, "rewards.0.name")
    with pytest.raises(RewardError, match="cannot load"):
        reward(["a"], pictures(1)[1])


def test_an_image_with_nan_gets_no_score(folder):
    _, images = pictures(2)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        build("clip", {"model": folder}, "rewards.0.name")(PROMPTS[:2], images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modle": "x"}, r"rewards\.3\.modle: unknown option; did you mean model\?"),
        ({"batch_size": 0}, r"rewards\.3\.batch_size: input should be greater than or equal to 1"),
        ({"batch_size": "many"}, r"rewards\.3\.batch_size: input should be a valid integer"),
        ({"dtype": "int8"}, r"rewards\.3\.dtype: input should be 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_options_are_checked_before_anything_loads(options, message):
    with pytest.raises(UsageError, match=message):
        build("pickscore", options, "rewards.3.name")


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(UsageError, match=r"(?s)batch_size.*revison"):
        build("clip", {"batch_size": 0, "revison": "main"}, "rewards.0.name")
