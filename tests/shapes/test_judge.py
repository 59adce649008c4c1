from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from fdfo_engine.rewards.shapes import shapes, shapes_strict
from fdfo_engine.shapes.judge import find_objects, judge
from fdfo_engine.shapes.render import render
from fdfo_engine.shapes.scene import COLOURS, COUNTS, RELATIONS, SHAPES, captions, parse

TEXTS = captions("train", 500, seed=11)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(12)
    return [render(text, rng) for text in TEXTS]


def changed(text, rng):
    """The caption with one fact changed; the result need not be a caption the generator would draw."""
    facts = parse(text)
    kind = rng.choice(["colour", "shape", "relation" if facts.relation else "count"])
    if kind == "relation":
        return replace(facts, relation=rng.choice([r for r in RELATIONS if r != facts.relation])).text()
    index = int(rng.integers(len(facts.groups)))
    options = {"colour": COLOURS, "shape": SHAPES, "count": tuple(COUNTS.values())}[kind]
    now = getattr(facts.groups[index], kind)
    other = options[int(rng.choice([i for i, option in enumerate(options) if option != now]))]
    groups = list(facts.groups)
    groups[index] = replace(groups[index], **{kind: other})
    return replace(facts, groups=tuple(groups)).text()


def test_ground_truth_is_right(pictures):
    verdicts = [judge(text, picture) for text, picture in zip(TEXTS, pictures, strict=True)]
    assert np.mean([verdict.strict and verdict.score == 1 for verdict in verdicts]) >= 0.98


def test_one_wrong_fact_is_seen(pictures):
    rng, verdicts = np.random.default_rng(13), []
    for text, picture in zip(TEXTS, pictures, strict=True):
        try:
            verdicts.append(judge(changed(text, rng), picture))
        except ValueError:  # the change made a text that is no caption, four objects for example
            continue
    assert len(verdicts) > 300
    assert all(verdict.score < 1 for verdict in verdicts)
    assert np.mean([not verdict.strict for verdict in verdicts]) >= 0.99


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_noise_and_flat_pictures_score_zero(size):
    rng = np.random.default_rng(14)
    for text in TEXTS[:30]:
        shape = (3, size, size)
        flat = np.broadcast_to(rng.random((3, 1, 1)), shape)
        spreads = (0.1, 0.3, 1.0)
        for picture in (flat, rng.random(shape), *(rng.normal(0.5, spread, shape) for spread in spreads)):
            assert judge(text, picture).score == 0


def test_saturated_field_is_no_object():
    assert find_objects(np.stack([np.ones((64, 64)), np.zeros((64, 64)), np.zeros((64, 64))])) == []
    assert judge("a red circle", np.full((3, 64, 64), np.nan)).score == 0


@pytest.mark.parametrize("resize", [lambda p: p.repeat(3, 1).repeat(3, 2), lambda p: p.repeat(4, 1).repeat(4, 2)])
def test_other_sizes(pictures, resize):
    right = [judge(text, resize(picture)).strict for text, picture in zip(TEXTS[:60], pictures, strict=False)]
    assert np.mean(right) >= 0.98


def test_small_pictures(pictures):
    halves = [picture.reshape(3, 32, 2, 32, 2).mean((2, 4)) for picture in pictures[:100]]
    assert np.mean([judge(text, half).strict for text, half in zip(TEXTS, halves, strict=False)]) >= 0.9


def test_tolerates_blur_and_grain(pictures):
    rng, right = np.random.default_rng(15), []
    for text, picture in zip(TEXTS[:150], pictures, strict=False):
        soft = ndimage.gaussian_filter(picture, (0, 0.6, 0.6)) + rng.normal(0, 0.04, picture.shape)
        right.append(judge(text, soft).strict)
    assert np.mean(right) >= 0.97


def test_partial_credit_orders_mistakes():
    rng = np.random.default_rng(16)
    picture = render("a red circle left of a blue square", rng)
    right = judge("a red circle left of a blue square", picture).score
    one_shape = judge("a red triangle left of a blue square", picture).score
    one_object = judge("a yellow triangle left of a blue square", picture).score
    nothing = judge("a yellow triangle left of a green triangle", picture).score
    assert right == 1 > one_shape > one_object > nothing > 0
    assert judge("a red circle", picture).score == pytest.approx(1 / 1.5)
    assert judge("a red circle right of a blue square", picture).score == pytest.approx(0.7)
    assert judge("two red circles", picture).score < 0.7


def test_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match="a picture is"):
        judge("a red circle", np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="not a shapes caption"):
        judge("a cat", np.zeros((3, 64, 64)))


def test_an_image_that_is_not_finite_has_no_score():
    images = torch.rand(2, 3, 64, 64)
    images[1, 0, 3, 4] = float("nan")
    for reward in (shapes, shapes_strict):
        scores = reward(["a red circle", "a red circle"], images)
        assert torch.isfinite(scores[0])
        assert torch.isnan(scores[1])
