"""What counts as a collapse or an explosion, on synthetic series of an epoch's mean reward."""

import math

import pytest

from fdfo_engine.training.watch import LEAST, SpikeWatch


def noise(i):
    return 0.01 * math.sin(12.9898 * i)


def seen(means, std=0.3):
    watch = SpikeWatch()
    return [watch.seen(mean, std) for mean in means]


@pytest.mark.parametrize(
    "means",
    [
        [2.3 + 0.006 * i + noise(i) for i in range(60)],  # a run that learns
        [1.0] * 20,  # one that does not move
        [0.8, 0.83, 0.85, 0.9, 0.93, 0.95, 0.96],  # the demo's pace
        [-3.0 + noise(i) for i in range(30)],
    ],
)
def test_training_is_quiet(means):
    assert not any(seen(means))


@pytest.mark.parametrize(("jump", "what"), [(-1.5, "collapsed"), (4.0, "exploded")])
@pytest.mark.parametrize("offset", [0.0, -20.0, 1000.0])
def test_a_jump_is_told_once_it_happens(jump, what, offset):
    means = [offset + 0.005 * i + noise(i) for i in range(12)]
    found = seen([*means, means[-1] + jump])
    assert not any(found[:-1])
    assert what in found[-1]


def test_the_first_epochs_are_not_judged():
    assert not any(seen([1.0] * (LEAST - 1) + [100.0]))
    assert seen([1.0] * LEAST + [100.0])[-1]
