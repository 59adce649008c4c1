"""What runs the pair ops of a run."""

from __future__ import annotations

import torch

from fdfo_engine.config import Config
from fdfo_engine.ops import backend_for, backends
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.errors import EnvironmentProblem


def pair_backend(config: Config, device: torch.device) -> str:
    """Plain torch is slow: it only runs where it was asked for, or with a warning."""
    wanted = config.kernels.backend
    chosen = backend_for(device, None if wanted == "auto" else wanted)
    if chosen == "torch" and (wanted == "auto" or config.kernels.require):
        reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in backends().items() if why)
        if config.kernels.require:
            raise EnvironmentProblem(f"kernels.require: the pair ops would run on plain torch ({reasons})")
        warn(f"the pair ops run on plain torch: {reasons}")
    return chosen
