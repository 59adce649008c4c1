"""A rollout that a reward failed on: kept in the run's folder, so that a resumed run scores it without sampling it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.distributed import any_rank, on_main, together
from fdfo_engine.runtime.errors import FdfoError, error_message
from fdfo_engine.trajectory.rollout import Rollout


class UnscoredRollout:
    """At most one, under `folder`. Every method is collective."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._partial = folder.with_name(f"{folder.name}.partial")

    def keep(self, rollout: Rollout) -> None:
        """Writes it; where that fails, it says so and the pairs will be sampled again."""
        try:
            on_main(self._clear)
            together(lambda: rollout.save(self._partial))
            on_main(lambda: self._partial.rename(self._folder))
        except (OSError, SafetensorError, FdfoError) as error:
            on_main(self._clear)
            warn(f"the images without a reward could not be kept: {error_message(error)}")
            return
        say(f"kept the images without a reward in {self._folder}; the same command scores them again")

    def take(self, next_pair: int, weights_version: int, device: torch.device) -> Rollout | None:
        """What was kept, if these weights would sample it next; whatever was kept is then gone."""
        if not any_rank(self._folder.is_dir()):
            on_main(self._clear)
            return None
        try:
            rollout = together(lambda: Rollout.load(self._folder, device))
        except (OSError, ValueError, SafetensorError, FdfoError) as error:
            warn(f"{error_message(error)}; sampling again")
            return None
        finally:
            on_main(self._clear)
        if (rollout.first_pair, rollout.weights_version) != (next_pair, weights_version):
            return None
        say(f"scoring again the {rollout.num_pairs} pairs that a reward failed on")
        return rollout

    def _clear(self) -> None:
        for folder in (self._folder, self._partial):
            shutil.rmtree(folder, ignore_errors=True)
