"""Rewards: a registry, a weighted list, one file a reward."""

from fdfo_engine.rewards.registry import Reward, build, names, register
from fdfo_engine.rewards.weighted import Scores, WeightedRewards, labelled

__all__ = ["Reward", "Scores", "WeightedRewards", "build", "labelled", "names", "register"]
