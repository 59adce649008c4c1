"""What a rollout leaves for the update."""

from fdfo_engine.trajectory.rollout import Rollout
from fdfo_engine.trajectory.unscored import UnscoredRollout

__all__ = ["Rollout", "UnscoredRollout"]
