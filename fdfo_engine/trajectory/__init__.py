"""What a rollout leaves for the update."""

from fdfo_engine.trajectory.rollout import Rollout

__all__ = ["Rollout"]
