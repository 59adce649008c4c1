"""The methods of training, one file each, behind `update.algorithm.Algorithm`."""

from fdfo_engine.algorithms.choice import build_algorithm

__all__ = ["build_algorithm"]
