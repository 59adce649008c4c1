"""What was measured on this machine: a file in the user's cache for each device, driver and set of versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fdfo_engine.planning.measuring import Timed
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.environment import describe_environment, user_cache
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.interleaved import Spread
from fdfo_engine.runtime.json_text import json_object

_VERSIONS = ("fdfo-engine", "torch", "triton", "xformers")


def machine_of(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on beside the shapes: device, driver, versions, and on a CPU the threads."""
    environment = describe_environment()
    found: dict[str, Any] = {name: environment["packages"][name] for name in _VERSIONS}
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device), **environment["cuda"]}
    return found | {"device": environment["cpu"], "threads": torch.get_num_threads()}


class Batches(NamedTuple):
    """Samples in one forward of a rollout, and in one micro-batch."""

    rollout: int
    train: int

    def __str__(self) -> str:
        return f"{self.rollout}, {self.train}"


class KernelCache:
    """Seconds by name of a call, of one device, at one pair of batch sizes."""

    def __init__(self, device: torch.device, batches: Batches) -> None:
        self._machine = machine_of(device)
        self._batches = str(batches)

    @property
    def file(self) -> Path:
        """Where they are; it may not be there.

        Raises:
            OSError: the user has no home folder.
        """
        name = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        return user_cache("kernels") / f"{name}.json"

    def load(self) -> dict[str, Timed]:
        """Those that are there; none, with a warning, where the file is damaged."""
        return {name: _timed(parts) for name, parts in self._content().get(self._batches, {}).items()}

    @classmethod
    def everything(cls, device: torch.device) -> dict[Batches, dict[str, Timed]]:
        """What is known of this device, by batches."""
        content = cls(device, Batches(1, 1))._content()
        return {
            Batches(*map(int, batches.split(","))): {name: _timed(parts) for name, parts in timed.items()}
            for batches, timed in content.items()
        }

    def save(self, timed: Mapping[str, Timed]) -> None:
        """Keeps `timed` beside what other shapes and batches have; a cache that can't be written is said."""
        content = self._content()
        content[self._batches] = content.get(self._batches, {}) | {name: asdict(of) for name, of in timed.items()}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, json.dumps({"machine": self._machine, "seconds": content}).encode())
        except (OSError, CheckpointError) as error:
            warn(f"kernels: what was measured is not kept: {error}")

    def _content(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json_object(self.file.read_bytes())["seconds"]
            for parts in found.values():
                _ = [_timed(timed) for timed in parts.values()]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"kernels: the cache {self.file} is damaged, and is measured again: {error!r}")
            return {}
        return found


def _timed(parts: Mapping[str, Mapping[str, list[float]]]) -> Timed:
    rollout, training = (
        {name: Spread(*map(float, of)) for name, of in parts[part].items()} for part in ("rollout", "training")
    )
    return Timed(rollout, training)
