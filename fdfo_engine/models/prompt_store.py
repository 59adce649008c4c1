"""Prompt embeddings on disk, so that a second run, or a resumed one, needs no text encoder.

A file is named by a hash of everything that its bits depend on: the text encoders and tokenizers by content, and what
`model_index.json` says of them, dtype, sequence length, device, library versions and the prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fdfo_engine.config import Config
from fdfo_engine.models.base_files import text_files
from fdfo_engine.models.base_model import Base
from fdfo_engine.models.flow_model import Conditioning
from fdfo_engine.models.registry import FAMILIES, locate_base
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.environment import package_version, user_cache
from fdfo_engine.runtime.errors import FdfoError

GIB = 1 << 30
SUFFIX = ".safetensors"
_LISTED_EVERY = 64
_LIBRARIES = ("fdfo-engine", "torch", "transformers", "tokenizers", "diffusers")
_KEPT_SHARE = 0.9


class PromptStore:
    """Embeddings under `folder`, at most `max_bytes` of them, the least recently used dropped first.

    Several processes may share a folder: files appear whole, and one that vanishes is a miss. A damaged file is
    reported and counts as a miss. Storage that fails costs a warning, never the run.
    """

    def __init__(self, folder: Path, identity: str, max_bytes: int) -> None:
        self._folder, self._identity, self._max_bytes = folder, identity, max_bytes
        self._writes = 0
        self._is_broken = False

    def load(self, prompt: str) -> Conditioning | None:
        """The row of `prompt`, on the CPU, bit for bit as `save` got it; None where there is none."""
        path = self._path(prompt)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                written = (file.metadata() or {}).get("sha256")
            with contextlib.suppress(OSError):  # a cache that others own is read all the same
                os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            warn(f"{path}: damaged ({error}); the prompt is encoded again")
            return None
        if written != _digest(tensors):
            warn(f"{path}: damaged (its checksum differs); the prompt is encoded again")
            return None
        return Conditioning(tensors)

    def save(self, prompt: str, row: Conditioning) -> None:
        """Keeps `row`, one row on the CPU."""
        if self._is_broken:
            return
        tensors = {name: t.contiguous() for name, t in row.tensors.items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(prompt), save(tensors, metadata={"sha256": _digest(tensors)}))
            if self._writes % _LISTED_EVERY == 0 or self._max_bytes < _LISTED_EVERY * row.nbytes:
                self._drop_oldest()
            self._writes += 1
        except (OSError, FdfoError) as error:
            self._is_broken = True
            warn(f"model.prompt_cache: {self._folder} keeps no more embeddings: {error}")

    def _path(self, prompt: str) -> Path:
        return self._folder / (hashlib.sha256(json.dumps([self._identity, prompt]).encode()).hexdigest() + SUFFIX)

    def _drop_oldest(self) -> None:
        found = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process dropped it
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._max_bytes:
            return
        for _, size, path in sorted(found)[:-1]:
            if total <= _KEPT_SHARE * self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def open_prompt_store(config: Config, device: torch.device, base: Base | None = None) -> PromptStore | None:
    """The store that `model.prompt_cache` asks for; None for false, and for a model that has no pipeline folder.

    Raises:
        UsageError, EnvironmentProblem: as `locate_base`, where `base` is not given.
    """
    settings = config.model
    if settings.prompt_cache is False:
        return None
    try:
        cache = settings.prompt_cache
        folder = user_cache("prompts") if cache == "auto" else Path(cache).expanduser()
    except (OSError, RuntimeError) as error:
        warn(f"model.prompt_cache: no embeddings are kept: {error}")
        return None
    base = base or locate_base(config)
    if base.folder is None:
        return None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [package_version(name) for name in _LIBRARIES]
    parts = [
        _encoders(base.folder, settings.variant),
        _own_family(settings.family),
        settings.dtype,
        settings.max_sequence_length,
    ]
    parts += [config.run.deterministic, where, *versions]
    return PromptStore(folder, json.dumps(parts), int(settings.prompt_cache_gib * GIB))


def _own_family(family: str) -> str | None:
    """A family of one's own; those of the project are told by the pipeline's class, which is among `_encoders`."""
    return None if family in ("auto", *FAMILIES) else family


def _encoders(pipeline: Path, variant: str | None) -> dict[str, str]:
    return {name: file.sha256 for name, file in text_files(pipeline, variant).items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
