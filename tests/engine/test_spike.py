"""What counts as a collapse or an explosion, on synthetic series of an epoch's mean reward."""

import math

import pytest
import torch

from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime.errors import RewardError
from fdfo_engine.training.scoring import Scored
from fdfo_engine.training.watch import LEAST, RewardWatch, SpikeWatch


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
    assert LEAST == 4
    assert not any(seen([1.0] * (LEAST - 1) + [100.0]))
    assert seen([1.0] * LEAST + [100.0])[-1]


SPREAD = [0.0, 1.0, 2.0, 3.0, 4.0]  # median 2, median distance from it 1


@pytest.mark.parametrize(
    ("means", "std", "limit"),
    [
        (SPREAD, 0.0, 8 * 1.4826),
        (SPREAD, 40.0, 8 * 0.05 * 40),  # where images differ by much more than epochs do
        ([100.0] * 12 + SPREAD * 2, 0.0, 8 * 1.4826),  # of the last ten epochs alone
        ([2.0] * 6, 0.0, 8 * 1e-9 * 2),
    ],
)
def test_a_jump_is_more_than_eight_robust_deviations_from_the_median(means, std, limit):
    for mean, told in ((2 + 0.999 * limit, None), (2 - 0.999 * limit, None), (2 + 1.001 * limit, "exploded"),
                       (2 - 1.001 * limit, "collapsed")):  # fmt: skip
        last = seen([*means, mean], std)[-1]
        assert last is None if told is None else (told in last and "after 2 (median of" in last)


def scored(*rows, first=40):
    total = torch.tensor(rows)
    rollout = type("Rollout", (), {"first_pair": first})
    return Scored(rollout, [f"prompt {row}" for row in range(len(rows))], {"mine": total}, total)


NAN = math.nan


def test_more_pairs_than_may_have_no_reward_end_the_run_by_name(capsys):
    watch = RewardWatch(0.25, WeightedRewards({"mine": (1.0, None)}))
    just = scored([1.0, 2.0], [1.0, 2.0], [1.0, NAN], [1.0, 2.0])
    assert not watch.lacks_rewards(just)
    watch.require_rewards(just, 9)
    assert "1 of 4 pairs have no reward" in capsys.readouterr().err
    many = scored([1.0, 2.0], [1.0, 2.0], [1.0, NAN], [math.inf, 2.0])
    assert watch.lacks_rewards(many)
    with pytest.raises(
        RewardError, match=r"2 of 4 pairs .*before epoch 9.*\n.*gave nan to pair 42, branch 1, prompt 'prompt 2'"
    ):
        watch.require_rewards(many, 9)
    watch.require_rewards(scored([1.0, 2.0]), 9)


def test_three_epochs_in_a_row_without_an_opinion_end_the_run(capsys):
    watch = RewardWatch(0.05, WeightedRewards({"mine": (1.0, None)}))
    tied, stepped = ({"optimizer_steps": steps, "skipped_steps": 0} for steps in (0, 4))
    skipped = {"optimizer_steps": 0, "skipped_steps": 4}
    for metrics in (tied, tied, stepped, tied, tied, skipped, tied, tied):
        watch.require_opinions(metrics)
    assert capsys.readouterr().err.count("is mine seeing the images?") == 6
    with pytest.raises(RewardError, match="3 epochs in a row without a single opinion from mine"):
        watch.require_opinions(tied)


def test_a_jump_is_looked_for_in_what_is_known():
    watch = RewardWatch(0.05, WeightedRewards({"mine": (1.0, None)}))
    for _ in range(5):
        assert watch.jump(scored([1.0, 1.0], [NAN, 1.0])) is None
    assert watch.jump(scored([NAN, NAN])) is None
    assert "exploded: 9 after 1" in watch.jump(scored([9.0, NAN]))
