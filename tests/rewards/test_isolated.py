"""A reward that hangs, dies or fails in a process of its own costs its opinion, and nothing else."""

import os
import time

import pytest
import torch

from fdfo_engine.config import RewardConfig
from fdfo_engine.rewards import Reward, WeightedRewards
from fdfo_engine.runtime.errors import UsageError

IMAGES = torch.linspace(0, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
PROMPTS = ["a", "b", "c", "\u00e9"]


def red(prompts, images):
    """Scores, and whose process it was: in the fraction."""
    return images[:, 0].mean((1, 2)) + torch.tensor([len(p) for p in prompts])


def hangs_on_bright(prompts, images):
    if images.mean() > 0.6:
        time.sleep(60)
    return images.mean((1, 2, 3))


def dies(prompts, images):
    os._exit(3)


def raises(prompts, images):
    raise KeyError("no such thing")


def process(prompts, images):
    return torch.full((len(prompts),), float(os.getpid()))


def isolated(function, tmp_path, kill_after_s=20.0):
    settings = RewardConfig(name=f"rewards.test_isolated:{function}", weight=1.0, kill_after_s=kill_after_s)
    return WeightedRewards.from_config([settings], tmp_path)


def scored(rewards, images=IMAGES):
    (scores,) = rewards(PROMPTS, images).values()
    return scores


def test_scores_are_the_rewards_own(tmp_path):
    rewards = isolated("red", tmp_path)
    scores = scored(rewards)
    rewards.cancel()
    assert torch.equal(scores, red(PROMPTS, IMAGES))


def test_it_runs_in_one_other_process(tmp_path):
    rewards = isolated("process", tmp_path)
    first, second = (scored(rewards) for _ in range(2))
    rewards.cancel()
    assert torch.equal(first, second)
    assert int(first[0]) != os.getpid()


def test_one_that_hangs_is_killed_and_the_next_batch_is_scored(tmp_path, capsys):
    rewards = isolated("hangs_on_bright", tmp_path, 1.0)
    dark, bright = IMAGES * 0.5, IMAGES * 0 + 0.9
    assert torch.isfinite(scored(rewards, dark)).all()
    start = time.monotonic()
    assert torch.isnan(scored(rewards, bright)).all()
    assert time.monotonic() - start < 50, "it would have slept for a minute"
    assert "no scores after 1 s (kill_after_s); its process was killed; trying once more" in capsys.readouterr().err
    assert torch.equal(scored(rewards, dark), dark.mean((1, 2, 3)))
    rewards.cancel()


@pytest.mark.parametrize(("function", "message"), [("dies", "exit code 3"), ("raises", "no such thing")])
def test_a_failure_is_told_and_has_no_opinion(tmp_path, capsys, function, message):
    rewards = isolated(function, tmp_path)
    assert torch.isnan(scored(rewards)).all()
    assert message in capsys.readouterr().err
    rewards.cancel()


def test_a_misspelt_name_is_refused_before_a_process_starts(tmp_path):
    with pytest.raises(UsageError, match=r"rewards\.0\.name"):
        isolated("no_such_function", tmp_path)


class Noting(Reward):
    def __init__(self):
        self.noted = []

    def __call__(self, prompts, images):
        self.noted += images.mean((1, 2, 3)).tolist()
        return images.mean((1, 2, 3))

    def take_notes(self):
        taken, self.noted = self.noted, []
        return {"light": torch.tensor(taken)}


def test_what_it_notes_comes_along(tmp_path):
    rewards = isolated("Noting", tmp_path)
    (_, reward) = next(iter(rewards.rewards.values()))
    assert reward.take_notes()["light"].shape == (0,)
    assert rewards.note_means() == {}
    scores = torch.cat([scored(rewards), scored(rewards, 1 - IMAGES)])
    means = rewards.note_means()
    rewards.cancel()
    assert means == {"light_rewards.test_isolated:Noting": pytest.approx(float(scores.mean()))}
    assert rewards.note_means() == {}
