"""The self-test tells a reward that sees from one that does not; with real weights only where they are at hand."""

import json

import pytest
import torch

from fdfo_engine.rewards import build
from fdfo_engine.rewards.drawings import CIRCLE_PROMPT
from fdfo_engine.rewards.ocr import asked_text
from fdfo_engine.rewards.self_test import self_test
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError


def test_a_reward_that_sees_passes():
    circle, noise = self_test(lambda prompts, images: images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2)), side=64)
    assert circle > 0.1 > noise


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, images: torch.zeros(2), "scores 0 where it is drawn and 0 for the other"),
        (lambda prompts, images: torch.tensor([0.0, 1.0]), "for the other image"),
        (lambda prompts, images: torch.tensor([1.0, torch.nan]), "takes two numbers"),
        (lambda prompts, images: torch.ones(1), "takes two numbers"),
    ],
)
def test_a_reward_that_does_not_see_fails(reward, message):
    with pytest.raises(RewardError, match=message):
        self_test(reward)


@pytest.mark.parametrize(("name", "images"), [("shapes", 64), ("shapes_strict", 64)])
def test_programs_that_look_at_pixels_see(name, images):
    self_test(build(name, {}, "x"), side=images)


def test_the_reader_reads_its_own_case():
    pytest.importorskip("rapidocr_onnxruntime")
    written, empty = self_test(build("ocr", {}, "x"))
    assert (written, empty) == (1.0, 0.0)


def test_a_case_of_its_own_is_taken():
    reward = build("ocr", {}, "x")
    prompt, images = reward.self_test_case(64)
    assert asked_text(prompt) == ["OPEN"]
    assert images.shape == (2, 3, 64, 64)
    assert (images[0] < 0.5).any()
    assert (images[1] == 1).all()
    reward._read = lambda image: "open" if (image < 100).any() else ""
    assert self_test(reward, side=64) == (1.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["clip", "pickscore", "hpsv2", "aesthetic", "vlm_alignment", "vlm_quality", "vlm_photorealism", "geneval"]
)
def test_real_weights_see(name, tmp_path):
    """Takes weights from the local hub cache only."""
    circle = {"prompt": CIRCLE_PROMPT, "include": [{"class": "circle", "count": 1, "color": "red"}]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(circle))
    options = {"metadata": str(tmp_path / "metadata.jsonl")} if name == "geneval" else {}
    try:
        self_test(build(name, {"allow_download": False, **options}, "x"))
    except (RewardError, EnvironmentProblem) as error:
        if "self-test" in str(error):
            raise
        pytest.skip(f"no weights here: {error}")
