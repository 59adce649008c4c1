"""Rewards: a base class, a registry, a weighted list, one file a reward."""

from fdfo_engine.rewards.registry import build, names, register, with_own_rewards
from fdfo_engine.rewards.reward import Reward, as_reward
from fdfo_engine.rewards.weighted import WeightedRewards, labelled

__all__ = ["Reward", "WeightedRewards", "as_reward", "build", "labelled", "names", "register", "with_own_rewards"]
