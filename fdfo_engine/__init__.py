"""FDFO engine: online RL post-training of text-to-image flow models by paired trajectories (arXiv 2603.12893)."""

import importlib
from typing import TYPE_CHECKING, Any

from fdfo_engine._source_tree import map_kernels

if TYPE_CHECKING:
    from fdfo_engine.config import load_config
    from fdfo_engine.engine import Engine
    from fdfo_engine.loop import run
    from fdfo_engine.trajectory import Rollout

map_kernels()
__version__ = "0.1.0"
__all__ = ["Engine", "Rollout", "load_config", "run"]

_HOMES = {"Engine": "engine", "Rollout": "trajectory", "load_config": "config", "run": "loop"}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `import fdfo_engine` alone stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
