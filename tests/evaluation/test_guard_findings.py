"""The guard's judgement on records made by hand."""

import pytest

from fdfo_engine.config import GuardConfig
from fdfo_engine.evaluation.guard import findings, last_in_order, out_of_order

GUARD = GuardConfig(action="stop", max_drift=1.0, reward_drop=2.0)
UP = [{"epoch": e, "reward_mean": 0.1 * e + (-0.05 if e % 2 else 0.05)} for e in range(1, 21)]
DOWN = [{"epoch": e, "reward_mean": -0.1 * e} for e in range(1, 21)]


def evaluation(epoch, reward=0.5, metric=0.5, **health):
    return {
        "epoch": epoch,
        "reward": reward,
        "reward_stderr": 0.03,
        "metrics": {"m": metric},
        "metrics_stderr": {"m": 0.04},
        "health": {"saturation": 0.3, "sharpness": 0.05, **health},
        "health_std": {"saturation": 0.1, "sharpness": 0.03},
    }


def test_nothing_moves_nothing_is_found():
    assert findings([evaluation(0)], [], GUARD) == []
    assert findings([evaluation(0), evaluation(10)], UP, GUARD) == []


def test_a_measure_that_leaves_its_band_is_named_with_its_numbers():
    (sentence,) = findings([evaluation(0), evaluation(10, saturation=0.45)], UP, GUARD)
    assert sentence == (
        "saturation went from 0.3 to 0.45, 1.5 standard deviations of the reference images (limit 1)"
    )  # fmt: skip
    assert findings([evaluation(0), evaluation(10, saturation=0.39)], UP, GUARD) == []
    assert findings([evaluation(0), evaluation(10, saturation=0.1)], UP, GUARD), "down counts as well"


@pytest.mark.parametrize("epochs", [DOWN, UP[:1], [], [{"epoch": e, "reward_mean": None} for e in range(9)]])
def test_only_while_the_training_reward_climbs(epochs):
    assert findings([evaluation(0), evaluation(10, saturation=0.9, reward=0.0)], epochs, GUARD) == []


def test_epochs_after_the_evaluation_are_left_out():
    late = [{"epoch": e, "reward_mean": float(e > 10) * e} for e in range(1, 21)]
    assert findings([evaluation(0), evaluation(10, saturation=0.9)], late, GUARD) == []


def test_absolute_bands_come_instead_of_the_drift():
    guard = GuardConfig(bands={"saturation": (0.2, 0.5)})
    assert findings([evaluation(0), evaluation(10, saturation=0.49)], UP, guard) == []
    (sentence,) = findings([evaluation(0), evaluation(10, saturation=0.51)], UP, guard)
    assert "outside its band 0.2 to 0.5" in sentence


def test_a_fall_is_counted_in_standard_errors_of_both_from_the_best():
    history = [evaluation(0, 0.4), evaluation(5, 0.6), evaluation(10, 0.52)]
    assert findings(history, UP, GUARD) == [], "0.08 < 2 * sqrt(2) * 0.03"
    (sentence,) = findings([*history, evaluation(15, 0.51)], UP, GUARD)
    assert sentence.startswith("held-out reward fell from 0.6 to 0.51, more than 2 standard errors (0.042)")
    (sentence,) = findings([evaluation(0), evaluation(5, metric=0.3)], UP, GUARD)
    assert sentence.startswith("m fell from 0.5 to 0.3")


def test_unknown_values_find_nothing():
    """A log has null where a mean was over no image; a record in memory has NaN."""
    for nothing in (None, float("nan")):
        blank = evaluation(10, nothing, nothing, saturation=nothing)
        assert findings([evaluation(0), blank], UP, GUARD) == []
        assert findings([blank | {"epoch": 0}, evaluation(10)], UP, GUARD) == []
        assert findings([evaluation(0, 0.9), blank, evaluation(15, 0.1)], UP, GUARD), "the best before it still counts"


def test_evaluations_in_a_row():
    marks = [[], ["x"], [], ["y"], ["y", "z"]]
    records = [evaluation(5 * i) | {"guard": mark} for i, mark in enumerate(marks)]
    assert [out_of_order(records[:n]) for n in range(6)] == [0, 0, 1, 0, 1, 2]
    assert last_in_order(records) == 10
    assert last_in_order([evaluation(0)]) is None, "an evaluation from before the guard was set"
