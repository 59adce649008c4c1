"""Prompt embeddings on disk, so that a second run, or a resumed one, needs no text encoder.

A file is named by a hash of everything that its bits depend on: the text encoders and tokenizers (by the hub's commit,
or by the contents of a local folder), dtype, sequence length, device, library versions and the prompt.
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
from fdfo_engine.models.flow_model import Conditioning
from fdfo_engine.models.registry import model_index, resolve_model_id
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.durable import replace_file, sha256_of
from fdfo_engine.runtime.environment import package_version
from fdfo_engine.runtime.errors import EnvironmentProblem, FdfoError

GIB = 1 << 30
SUFFIX = ".safetensors"
_LISTED_EVERY = 64
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


def open_prompt_store(config: Config, device: torch.device) -> PromptStore | None:
    """The store that `model.prompt_cache` asks for; None for false, and for a model that has no pipeline folder."""
    settings = config.model
    if settings.prompt_cache is False:
        return None
    if settings.prompt_cache == "auto":
        folder = Path("~/.cache/fdfo_engine/prompts")
        if cache := os.environ.get("XDG_CACHE_HOME"):
            folder = Path(cache) / "fdfo_engine" / "prompts"
    else:
        folder = Path(settings.prompt_cache)
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        warn(f"model.prompt_cache: no embeddings are kept: {error}")
        return None
    try:
        encoders = _encoders(resolve_model_id(settings.id), settings.revision)
    except EnvironmentProblem:
        return None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [package_version(name) for name in ("fdfo-engine", "torch", "transformers", "diffusers")]
    parts = [encoders, settings.family, settings.dtype, settings.max_sequence_length, where, *versions]
    return PromptStore(folder, json.dumps(parts), int(settings.prompt_cache_gib * GIB))


def _encoders(model_id: str, revision: str | None) -> str:
    """The hub's commit, or a hash of a local folder's text encoders and tokenizers."""
    index = model_index(model_id, revision)
    if not Path(model_id).is_dir():
        return f"{model_id}@{index.parent.name}"  # hub files lie in a folder named by their commit
    parts = [p for p in sorted(index.parent.iterdir()) if p.name.startswith(("text_encoder", "tokenizer"))]
    files = [file for part in parts for file in sorted(part.rglob("*")) if file.is_file()]
    names = [[str(file.relative_to(index.parent)), sha256_of(file)] for file in files]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
