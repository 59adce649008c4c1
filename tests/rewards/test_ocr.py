"""The OCR reward: what is asked for, how close the reading is; and, where the package is installed, real reading."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from fdfo_engine.rewards import build
from fdfo_engine.rewards.ocr import OcrReward, asked_text, letters, similarity
from fdfo_engine.runtime.errors import EnvironmentProblem


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "Open Late"', ["Open Late"]),
        ("a sign that says “Open” and «Shut»", ["Open", "Shut"]),
        ("a dog's bowl, it's empty", []),
        ('a "" sign', []),
    ],
)
def test_quotes_tell_what_is_asked(prompt, expected):
    assert asked_text(prompt) == expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("open", "open", 1.0), ("open", "", 0.0), ("", "", 1.0), ("open", "opem", 0.75), ("abc", "xabc", 0.75),
     ("kitten", "sitting", 1 - 3 / 7)],
)  # fmt: skip
def test_similarity_is_the_normalised_edit_distance(one, other, expected):
    assert similarity(one, other) == similarity(other, one) == pytest.approx(expected)


def test_case_spaces_and_punctuation_do_not_count():
    assert letters("Hello, World! 42") == letters("HELLOWORLD42") == "helloworld42"


@pytest.mark.parametrize(
    ("lines", "score"),
    [([[None, "OPEN", 0.9], [None, "late!", 0.8]], 1.0), ([[None, "Openlite", 0.9]], 0.875), (None, 0.0)],
)
def test_lines_are_read_together(lines, score):
    reward = build("ocr", {}, "x")
    reward.__dict__["_reader"] = lambda pixels: (lines, 0.1)
    scores = reward(['a sign "Open Late"', "no text asked for"], torch.zeros(2, 3, 8, 8))
    assert scores.tolist() == [pytest.approx(score), 1.0]


def drawn(text):
    picture = Image.new("RGB", (256, 256), (240, 240, 235))
    ImageDraw.Draw(picture).text((30, 100), text, fill=(20, 30, 120), font=ImageFont.load_default(40))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def test_it_reads():
    pytest.importorskip("rapidocr_onnxruntime")
    prompt = 'a poster with the words "Hello World"'
    scores = OcrReward(OcrReward.Options())(
        [prompt] * 3, torch.stack([drawn("Hello World"), drawn("Hollow"), drawn("")])
    )
    assert scores[0] == 1.0
    assert scores[0] > scores[1] > scores[2] == 0.0


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidocr_onnxruntime", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'fdfo-engine\[ocr\]'"):
        OcrReward(OcrReward.Options())(['"x"'], torch.zeros(1, 3, 8, 8))
