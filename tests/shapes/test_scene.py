import numpy as np
import pytest

from fdfo_engine.shapes.render import place, render
from fdfo_engine.shapes.scene import WORDS, Facts, Group, captions, parse, split_of


def test_parses_each_form():
    assert parse("two red squares") == Facts((Group(2, "red", "square"),))
    assert parse("a red circle and two blue circles") == Facts((Group(1, "red", "circle"), Group(2, "blue", "circle")))
    related = parse("A green circle  left of a blue triangle.")
    assert related == Facts((Group(1, "green", "circle"), Group(1, "blue", "triangle")), "left of")
    assert parse("two red squares").objects == (("red", "square"), ("red", "square"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "two red square",
        "a red circles",
        "a pink circle",
        "two red circles and two blue circles",
        "two red circles left of a blue square",
        "a red circle and a red circle",
        "a red circle above",
    ],
)
def test_refuses_other_text(text):
    with pytest.raises(ValueError, match="not a shapes caption"):
        parse(text)


def test_drawn_captions_round_trip():
    for split in ("train", "heldout"):
        for text in captions(split, 1500, seed=3):
            assert parse(text).text() == text
            assert set(text.split()) <= set(WORDS)
            assert split_of(text) == split


def test_splits_are_disjoint_and_large():
    train, held_out = set(captions("train", 20_000, seed=0)), set(captions("heldout", 4000, seed=0))
    assert not train & held_out
    assert len(train) > 1500
    assert len(held_out) > 200


def test_captions_repeat_by_seed():
    assert captions("train", 50, seed=1) == captions("train", 50, seed=1)
    assert captions("train", 50, seed=1) == captions("train", 99, seed=1)[:50]
    assert captions("train", 50, seed=1) != captions("train", 50, seed=2)


def test_layouts_satisfy_their_caption():
    rng = np.random.default_rng(0)
    signs = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for text in captions("train", 300, seed=4):
        facts = parse(text)
        layout = place(facts, rng)
        assert tuple((item.colour, item.shape) for item in layout) == facts.objects
        for i, a in enumerate(layout):
            assert all(np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for b in layout[:i])
        if facts.relation:
            first, second = layout
            dx, dy = signs[facts.relation]
            assert (first.x - second.x) * dx + (first.y - second.y) * dy > 15


def test_render_repeats_by_generator():
    first, second = (render("a red circle and a blue circle", np.random.default_rng(5)) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == (3, 64, 64)
    assert 0 <= first.min() < first.max() <= 1
    np.testing.assert_array_equal(first, second)
