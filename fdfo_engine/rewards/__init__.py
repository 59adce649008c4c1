"""Rewards: a registry, a weighted list, one file a reward."""
