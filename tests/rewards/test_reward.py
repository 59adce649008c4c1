"""The base class of rewards: what is asked of every reward, whoever wrote it, and who answers in another process."""

import os

import pytest
import torch

from fdfo_engine.config import RewardConfig
from fdfo_engine.rewards import Reward, WeightedRewards, build
from fdfo_engine.rewards.self_test import self_test
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError, UsageError

HERE = "rewards.test_reward"
IMAGES = torch.linspace(0, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def plain(prompts, images, factor=1.0):
    return factor * images.flatten(1).mean(1)


class Choosy(Reward):
    """Answers every question, and says in its scores whether downloads were forbidden where it runs."""

    def __init__(self, size=7):
        self.size, self.forbidden, self.cancelled = size, False, False

    def __call__(self, prompts, images):
        return torch.full((len(prompts),), float(self.forbidden) + (os.getpid() if self.size is None else 0))

    def require_ready(self):
        raise EnvironmentProblem("not ready")

    def require_prompts(self, prompts):
        raise RewardError(f"knows nothing of {prompts[0]}")

    def forbid_downloads(self):
        self.forbidden = True

    def gpu_bytes(self):
        return self.size

    def cancel(self):
        self.cancelled = True

    def self_test_case(self, side):
        return "mine", torch.ones(2, 3, side, side)


class Duck:
    def __call__(self, prompts, images):
        return images.flatten(1).mean(1)

    def require_ready(self):
        raise AssertionError("never called")


@pytest.mark.parametrize("kill_after_s", [None, 60.0])
def test_a_plain_function_answers_all_questions_by_default(kill_after_s):
    settings = RewardConfig(name=f"{HERE}:plain", weight=1.0, factor=3.0, kill_after_s=kill_after_s)
    rewards = WeightedRewards.from_config([settings])
    rewards.require_ready()
    rewards.require_prompts(["anything"])
    rewards.forbid_downloads()
    assert rewards.gpu_bytes() == (0, [])
    (scores,) = rewards(["a", "b"], IMAGES).values()
    rewards.cancel()
    assert torch.allclose(scores, 3 * IMAGES.flatten(1).mean(1))


def test_the_questions_of_a_class_are_its_own():
    rewards = WeightedRewards.from_config([RewardConfig(name=f"{HERE}:Choosy", weight=1.0, size=None)])
    ((_, reward),) = rewards.rewards.values()
    with pytest.raises(EnvironmentProblem, match="not ready"):
        rewards.require_ready()
    with pytest.raises(RewardError, match="knows nothing of it"):
        rewards.require_prompts(["it"])
    assert rewards.gpu_bytes() == (0, [f"{HERE}:Choosy"])
    rewards.cancel()
    rewards.forbid_downloads()
    assert (reward.cancelled, reward.forbidden) == (True, True)


def test_an_isolated_reward_answers_as_the_one_it_holds():
    rewards = WeightedRewards.from_config([RewardConfig(name=f"{HERE}:Choosy", weight=1.0, kill_after_s=60.0)])
    ((_, reward),) = rewards.rewards.values()
    with pytest.raises(EnvironmentProblem, match="not ready"):
        rewards.require_ready()
    with pytest.raises(RewardError, match="knows nothing of it"):
        rewards.require_prompts(["it"])
    assert rewards.gpu_bytes() == (7, [])
    assert reward.self_test_case(4)[0] == "mine"
    rewards.forbid_downloads()
    (scores,) = rewards(["a", "b"], IMAGES).values()
    rewards.cancel()
    assert scores.tolist() == [1.0, 1.0], "downloads are forbidden in its process too"
    assert not hasattr(reward, "forbidden"), "what is no question to a reward is not passed on"


def test_methods_that_nobody_would_call_are_refused():
    with pytest.raises(UsageError, match=r"Duck: has require_ready.*fdfo_engine\.rewards\.Reward"):
        build(f"{HERE}:Duck", {}, "rewards.0.name")


def test_a_self_test_takes_the_rewards_own_case():
    with pytest.raises(RewardError, match="mine scores 0"):
        self_test(Choosy())
