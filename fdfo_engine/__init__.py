"""FDFO engine: online RL post-training of text-to-image flow models by paired trajectories (arXiv 2603.12893)."""

import importlib
from typing import TYPE_CHECKING, Any

from fdfo_engine._source_tree import map_kernels

if TYPE_CHECKING:
    from fdfo_engine import rewards
    from fdfo_engine.config import Config, load_config
    from fdfo_engine.engine import Engine
    from fdfo_engine.loop import run
    from fdfo_engine.rewards import register
    from fdfo_engine.runtime.errors import Cancelled, FdfoError, Stopped
    from fdfo_engine.runtime.events import Event
    from fdfo_engine.runtime.picture import save_images, to_pictures
    from fdfo_engine.trajectory import Rollout

map_kernels()
__version__ = "0.1.0"
__all__ = [
    "Cancelled",
    "Config",
    "Engine",
    "Event",
    "FdfoError",
    "Rollout",
    "Stopped",
    "load_config",
    "register",
    "rewards",
    "run",
    "save_images",
    "to_pictures",
]

_HOMES = {
    "Cancelled": "runtime.errors",
    "Config": "config",
    "Engine": "engine",
    "Event": "runtime.events",
    "FdfoError": "runtime.errors",
    "Rollout": "trajectory",
    "Stopped": "runtime.errors",
    "load_config": "config",
    "register": "rewards",
    "run": "loop",
    "save_images": "runtime.picture",
    "to_pictures": "runtime.picture",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `import fdfo_engine` alone stays cheap."""
    if name == "rewards":
        return importlib.import_module(f"{__name__}.rewards")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, and what every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
