"""Does a reward see? Two images of which anyone would prefer the first."""

from __future__ import annotations

import torch

from fdfo_engine.rewards.reward import Reward, Scorer, as_reward
from fdfo_engine.runtime.errors import RewardError


def self_test(reward: Reward | Scorer, side: int = 256) -> tuple[float, float]:
    """Scores of the two images of the reward's `self_test_case`, the better one first.

    Raises:
        RewardError: a score is missing, or the second is not liked less.
    """
    judge = as_reward(reward)
    prompt, images = judge.self_test_case(side)
    scores = torch.as_tensor(judge([prompt, prompt], images))
    if scores.shape != (2,) or not torch.isfinite(scores).all():
        raise RewardError(f"self-test: takes two numbers, got {scores.tolist()}")
    good, bad = scores.tolist()
    if good <= bad:
        raise RewardError(f"self-test: {prompt} scores {good:g} where it is drawn and {bad:g} for the other image")
    return good, bad
