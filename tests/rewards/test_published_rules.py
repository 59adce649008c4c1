"""Each published reward against its authors' rule for images and texts, written here from that rule alone.

Images: the pixels that reach the network, by Pillow and NumPy. Texts: the tokens, by ftfy, html and a byte-level
vocabulary. The network is transformers' own CLIPModel, at the published side of 224 pixels.
"""

import html

import ftfy
import numpy as np
import pytest
import regex
import torch
from PIL import Image
from rewards.tiny_clip import BYTES, build_tiny_clip
from safetensors.torch import save_file
from transformers import CLIPModel

from fdfo_engine.rewards import WeightedRewards, build
from fdfo_engine.rewards import clip_inputs as clip_inputs_module
from fdfo_engine.runtime.errors import EnvironmentProblem

SIDE, LIMIT = 224, 40
SIZES = [(64, 96), (96, 64), (64, 128), (128, 64), (201, 333), (333, 201), (300, 101), (512, 512), (225, 224), (97, 61)]
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
TEXTS = [
    "a red circle",
    "  A Red\t\tcircle\nand  a BLUE one ",
    "salt &amp; pepper, 3 &lt; 4",
    "twice &amp;amp; done",
    "\u201ccurly\u201d quotes, it\u2019s fine",
    "\ufb01ne \ufb02owers",
    "schÃ¶n brokenly encoded",
    "caf\u00e9 as one, cafe\u0301 as two marks",
    "left apart <e&#769;> by an entity",
    "\uff46\uff55\uff4c\uff4c width",
    "it's we're 3 cats, 14 dogs!?",
    "\u0130stanbul \u03a3\u03a3",
    "<|endoftext|> a cat",
    "",
    "so long a prompt that it is cut, " * 3,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = build_tiny_clip(tmp_path_factory.mktemp("clip"), side=SIDE, patch=32)
    generator = torch.Generator().manual_seed(1)
    shapes = {"layers.0.weight": (5, 24), "layers.0.bias": (5,), "layers.1.weight": (1, 5), "layers.1.bias": (1,)}
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(head, folder / "head.safetensors")
    return folder


@pytest.fixture(scope="module")
def network(folder):
    return CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()


def picture(height, width, seed=0):
    """Detail everywhere, so that no row or column may be lost unseen."""
    coarse = torch.rand(1, 3, height // 5 + 2, width // 5 + 2, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    pixels = (fine[0] * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()), (pixels.float() / 255)[None]


def normalised(array_HWC):
    return torch.from_numpy(((array_HWC - MEAN) / STD).transpose(2, 0, 1).copy())[None]


def middle_square(image, first):
    """Pillow resizes the shorter side, then the square that begins at `first(rest)` is cut out."""
    width, height = image.size
    size = (SIDE, int(SIDE * height / width)) if width <= height else (int(SIDE * width / height), SIDE)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = first(size[0] - SIDE), first(size[1] - SIDE)
    return normalised(np.array(resized.crop((left, top, left + SIDE, top + SIDE))) / 255)


def by_torchvision(image):
    """open_clip, OpenAI's CLIP: Resize(224, BICUBIC), CenterCrop(224): int(round(rest / 2.0)), a half to the even."""
    return middle_square(image, lambda rest: round(rest / 2.0))


def by_transformers(image):
    """CLIPImageProcessor: the crop begins at rest // 2."""
    return middle_square(image, lambda rest: rest // 2)


def cubic_weights(size, new_size):
    """Keys' cubic, a = -0.5, widened where the size shrinks; rows sum to 1."""
    scale = size / new_size
    wide, rows = max(scale, 1.0), np.zeros((new_size, size))
    for row in range(new_size):
        center = (row + 0.5) * scale
        for column in range(max(int(center - 2 * wide + 0.5), 0), min(int(center + 2 * wide + 0.5), size)):
            x = abs((column + 0.5 - center) / wide)
            near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            rows[row, column] = near if x < 1 else far if x < 2 else 0
    return rows / rows.sum(1, keepdims=True)


def by_hpsv2(image):
    """ToTensor, ResizeMaxSize(224) on the float tensor, padded with 0 on both sides, then normalised."""
    pixels = np.array(image) / 255
    height, width = pixels.shape[:2]
    scale = SIDE / float(max(height, width))
    new = [round(side * scale) for side in (height, width)]
    if scale != 1:
        pixels = np.einsum(
            "ah,hwc,bw->abc", cubic_weights(height, new[0]), pixels, cubic_weights(width, new[1]), optimize=True
        )
    top, left = (SIDE - new[0]) // 2, (SIDE - new[1]) // 2
    padded = np.zeros((SIDE, SIDE, 3))
    padded[top : top + new[0], left : left + new[1]] = pixels
    return normalised(padded)


def tokens(words):
    """Byte-level, one token a byte, the last of a word marked, as the tiny vocabulary has no merges."""
    pieces = [[BYTES[byte] for byte in word.encode()] for word in words]
    ids = [VOCAB[mark] for word in pieces for mark in [*word[:-1], word[-1] + "</w>"]]
    return [0, *ids[: LIMIT - 2], 1]


VOCAB = {piece: i for i, piece in enumerate(["", "", *BYTES.values(), *(mark + "</w>" for mark in BYTES.values())])}
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def text_by_open_clip(text):
    """basic_clean, whitespace_clean, lower; the marks of start and end are `<start_of_text>`, so others are words."""
    clean = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    clean = regex.sub(r"\s+", " ", clean).strip().lower()
    return tokens(regex.findall(WORDS, clean))


def text_by_transformers(text):
    """CLIPTokenizerFast: NFC, white space to one space, lower letter by letter; `<|endoftext|>` is the end mark."""
    import unicodedata

    clean = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    clean = "".join(letter.lower() for letter in clean)
    words = regex.findall(r"<\|endoftext\|>|" + WORDS, clean)
    if words[:1] == ["<|endoftext|>"]:
        return [0, 1]  # what follows the first end is not read
    return tokens(words)


RULES = {
    "clip": (by_torchvision, text_by_open_clip),
    "pickscore": (by_transformers, text_by_transformers),
    "hpsv2": (by_hpsv2, text_by_open_clip),
}


def unit(features):
    features = getattr(features, "pooler_output", features)
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def expected(network, name, text, image):
    image_rule, text_rule = RULES[name]
    texts = unit(network.get_text_features(input_ids=torch.tensor([text_rule(text)])))
    images = unit(network.get_image_features(pixel_values=image_rule(image)))
    return float((texts * images).sum()) * (float(network.logit_scale.exp()) if name == "pickscore" else 100)


def reward(name, folder, **more):
    model = {"model": str(folder), "processor": str(folder), "device": "cpu"}
    return build(name, model | more, "rewards.0.name")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", RULES)
def test_an_image_of_any_shape_is_seen_as_published(folder, network, name, size):
    image, tensor = picture(*size)
    (score,) = reward(name, folder)(["a red circle"], tensor)
    assert abs(score - expected(network, name, "a red circle", image)) < 1e-4


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_aesthetic_predictor_sees_as_published(folder, network, size):
    from safetensors.torch import load_file

    image, tensor = picture(*size)
    head = {"head": str(folder), "head_file": "head.safetensors", "model": str(folder), "device": "cpu"}
    (score,) = build("aesthetic", head, "x")(["any"], tensor)
    with torch.no_grad():
        values = unit(network.get_image_features(pixel_values=by_torchvision(image)))
    tensors = {name: value.double() for name, value in load_file(folder / "head.safetensors").items()}
    for layer in ("layers.0", "layers.1"):
        values = values @ tensors[f"{layer}.weight"].T + tensors[f"{layer}.bias"]
    assert abs(score - values.item()) < 1e-4


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", RULES)
def test_a_text_is_read_as_published(folder, network, name, text):
    image, tensor = picture(64, 64)
    (score,) = reward(name, folder)([text], tensor)
    assert abs(score - expected(network, name, text, image)) < 1e-4


def test_the_rules_are_not_the_same(folder):
    """Else the tests above could not tell one from another."""
    _, tensor = picture(201, 333)
    scores = [float(reward(name, folder)(["salt &amp; pepper"], tensor)[0]) for name in ("clip", "hpsv2")]
    assert abs(scores[0] - scores[1]) > 0.5
    image, _ = picture(201, 333)
    assert (by_torchvision(image) - by_transformers(image)).abs().max() > 0.1


def test_hpsv2_sees_what_lies_outside_the_middle(folder):
    _, tensor = picture(64, 128)
    other = tensor.clone()
    other[..., :24], other[..., -24:] = 1 - other[..., :24], 1 - other[..., -24:]
    one, two = (reward("hpsv2", folder)(["a red circle"], images) for images in (tensor, other))
    assert (one - two).abs() > 0.1
    one, two = (reward("clip", folder)(["a red circle"], images) for images in (tensor, other))
    assert (one - two).abs() < 1e-6


@pytest.mark.parametrize(("name", "crops"), [("clip", True), ("pickscore", True), ("hpsv2", False)])
def test_a_rule_that_crops_says_so_once(folder, capsys, name, crops):
    clip_inputs_module.tell_of_crop.cache_clear()
    rewards = WeightedRewards({name: (1.0, reward(name, folder))})
    _, square = picture(64, 64)
    rewards(["a"], square)
    assert "middle square" not in capsys.readouterr().err
    for _ in range(2):
        rewards(["a"], picture(64, 128)[1])
    said = capsys.readouterr().err
    assert said.count("middle square of 64 x 128 images only") == crops
    if crops:
        assert f"{name}: sees" in said
        assert "50% of each has no effect" in said


def test_without_ftfy_plain_prompts_are_scored_and_others_refused_at_the_start(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    _, tensor = picture(64, 64)
    hpsv2, pickscore = reward("hpsv2", folder), reward("pickscore", folder)
    hpsv2.require_prompts(["a red circle, 3 of them"])
    assert torch.isfinite(hpsv2(["a red circle, 3 of them"], tensor)).all()
    with pytest.raises(EnvironmentProblem, match="pip install ftfy"):
        hpsv2.require_prompts(["plain", "caf\u00e9"])
    with pytest.raises(EnvironmentProblem, match="pip install ftfy"):
        hpsv2(["salt &amp; pepper"], tensor)
    pickscore.require_prompts(["caf\u00e9"])
