"""Checkpoints that survive a kill at any instant, a full disk and a flipped bit.

A checkpoint is a folder: safetensors files (a large group of tensors as several, `weights-00001-of-00003.safetensors`),
`state.json`, and `manifest.json` with the size and SHA-256 of each. It is
written under a temporary name, synced, and renamed: under its final name it is whole. Nothing here is collective: rank
0 saves; on a shared storage every rank may load, and then compares the name (`all_agree_hash`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.durable import (
    open_to_readers,
    plain_json,
    require_room,
    sealed_json,
    sha256_of,
    storage_error,
    sync_file,
    sync_folder,
    unsealed_json,
    write_synced,
)
from fdfo_engine.runtime.environment import package_version
from fdfo_engine.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
_MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
_STATE = "state.json"
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"
_REMOVED = ".removed-"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one file, but for a tensor that is larger alone."""

_HEADER_BYTES = 1 << 20  # room for safetensors headers, state and manifest


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory.

    Attributes:
        name: its folder's name.
        tensors: file stem -> tensor name -> tensor, on the CPU.
        state: the JSON given to `save`.
        folder: where it lies.
    """

    name: str
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    folder: Path


def checkpoint_name(epoch: int) -> str:
    """The name of the checkpoint after `epoch` epochs; names sort by age."""
    return f"epoch_{epoch:06d}"


class CheckpointStore:
    """The checkpoints of one run, newest last by name: names must sort by age (`epoch_000010`).

    One process at a time may save (the run folder's lock sees to it); any number may read meanwhile.
    """

    def __init__(self, folder: Path | str, keep: int = 2, pinned: Collection[str] = ()) -> None:
        """`folder` is created by the first save; `keep` >= 2 newest checkpoints are kept, and `pinned` beside them."""
        if keep < 2:
            raise ValueError(f"keep = {keep}: takes 2 or more, or a damaged newest checkpoint would be the only one")
        self.folder = Path(folder)
        self.keep = keep
        self.pinned = frozenset(pinned)
        self._tidied = False

    def names(self) -> list[str]:
        """Committed checkpoints, oldest first; not verified."""
        return sorted(self._committed())

    def save(self, name: str, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Commits a checkpoint and then drops the oldest beyond `keep`. When this returns, it is on disk.

        Args:
            name: sorts after the existing ones; later ones (of a run resumed from before them) are dropped. An
                existing one of the same name is replaced.
            tensors: file stem -> tensors by name; any device, any strides, no two sharing memory.
            state: JSON; non-finite numbers become null.

        Raises:
            CheckpointError: no room, or the storage refuses; earlier checkpoints are untouched.
        """
        _require_plain_names([name, *tensors])
        self._tidy()
        temporary = self.folder / f"{_TEMPORARY}{name}-{os.getpid()}"
        final = self.folder / name
        try:
            require_room(self.folder, _size(tensors))
            temporary.mkdir()
            _write_contents(temporary, tensors, state)
            self._commit(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise storage_error(self.folder, error) from error
        self._drop_old(name)
        return final

    def load(self, name: str | None = None, *, strict: bool = False) -> Checkpoint | None:
        """Verifies and reads a checkpoint: `name`, or else the newest; None if none was ever committed.

        A damaged newest one is reported in a printed line, and the one before it is taken.

        Args:
            name: take this one or fail.
            strict: a damaged newest checkpoint is an error.

        Raises:
            CheckpointError: `name` does not exist; every candidate is damaged (lists them); any is, under `strict`
                or `name`; or the newest was written by a later schema, whose version it names.
        """
        committed = self._committed()
        if name is not None and name not in committed:
            raise CheckpointError(f"{self.folder}: no checkpoint {name!r}; found: {_listing(self.names())}")
        reasons = []
        for candidate in [name] if name is not None else sorted(committed, reverse=True):
            try:
                tensors, state = _read_verified(committed[candidate])
            except _DamagedError as damage:
                reasons.append(f"{candidate}: {damage}")
                if strict or name is not None:
                    break
                warn(f"checkpoint {candidate} is damaged and left out: {damage}")
                continue
            if reasons:
                say(f"resuming from checkpoint {candidate}, the newest that is whole")
            return Checkpoint(candidate, tensors, state, committed[candidate])
        if not reasons:
            return None
        raise CheckpointError("\n  ".join([f"{self.folder}: no usable checkpoint", *reasons]))

    def newest_state(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint, whose files are verified; None if there is none, or it is damaged.

        Raises:
            CheckpointError: it was written by a later schema, whose version it names.
        """
        committed = self._committed()
        if not committed:
            return None
        try:
            return _verified_state(committed[max(committed)])[1]
        except _DamagedError:
            return None

    def _committed(self) -> dict[str, Path]:
        """Name -> folder. One set aside by a killed replacement counts until its successor is there."""
        if not self.folder.is_dir():
            return {}
        folders = [path for path in self.folder.iterdir() if path.is_dir()]
        found = {p.name.removeprefix(_REPLACED): p for p in folders if p.name.startswith(_REPLACED)}
        return found | {p.name: p for p in folders if _NAME.fullmatch(p.name)}

    def _tidy(self) -> None:
        """Before the first save: removes what a killed writer left, and finishes its replacements."""
        self._make_folder()
        if self._tidied:
            return
        for path in self.folder.iterdir():
            if path.name.startswith((_TEMPORARY, _REMOVED)):
                _remove(path)
            elif path.name.startswith(_REPLACED):
                final = self.folder / path.name.removeprefix(_REPLACED)
                _remove(path) if final.exists() else path.rename(final)
        self._tidied = True

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def _commit(self, temporary: Path, final: Path) -> None:
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync_folder(self.folder)
        if replaced.exists():
            _remove(replaced)

    def _drop_old(self, newest: str) -> None:
        names = self.names()
        for name in (n for n in names if n > newest):
            say(f"checkpoint {name} removed: the run went on from before it")
            self._drop(name)
        for name in [n for n in names if n <= newest][: -self.keep]:
            if name not in self.pinned:
                self._drop(name)

    def _drop(self, name: str) -> None:
        """Out of sight by one rename first: a kill during the deletion must not leave half a checkpoint."""
        hidden = self.folder / f"{_REMOVED}{name}"
        try:
            _remove(hidden)
            (self.folder / name).rename(hidden)
        except OSError as error:
            warn(f"checkpoint {name} could not be removed: {error.strerror}")
            return
        _remove(hidden)


class _DamagedError(Exception):
    """Why a committed checkpoint cannot be used."""


def _write_contents(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    for stem, group in tensors.items():
        shards = _shards(group)
        for i, names in enumerate(shards, 1):
            number = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = folder / f"{stem}{number}.safetensors"
            save_file({name: group[name].detach().cpu().contiguous() for name in names}, path)
            sync_file(path)
    open_to_readers(folder)
    write_synced(folder / _STATE, json.dumps(plain_json(state), indent=1).encode())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fdfo_engine": package_version("fdfo-engine") or "unknown",
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(folder.iterdir())},
    }
    write_synced(folder / _MANIFEST, sealed_json(manifest, _SEAL))
    sync_folder(folder)


def _shards(group: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of `group` in order, cut so that no part's tensors exceed `SHARD_BYTES`; at least one part."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in group.items():
        size += tensor.nbytes
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(name)
    return shards


def _read_verified(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    from safetensors.torch import load_file

    names, state = _verified_state(folder)
    try:
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in (n for n in names if n.endswith(".safetensors")):
            tensors.setdefault(_SHARD.sub("", Path(name).stem), {}).update(load_file(folder / name))
    except OSError as error:
        raise _unreadable(folder, error) from error
    return tensors, state


def _verified_state(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of a checkpoint's files, each of which is as it was written, and its state."""
    try:
        files = _read_manifest(folder)
        for name, (size, digest) in files.items():
            _verify_file(folder / name, size, digest)
        return list(files), json.loads((folder / _STATE).read_bytes())
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> _DamagedError:
    return _DamagedError(f"{error.filename or folder} cannot be read: {error.strerror}")


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    path = folder / _MANIFEST
    _require_own_file(path)
    try:
        manifest = unsealed_json(path, _SEAL)
    except ValueError as error:
        raise _DamagedError(str(error)) from error
    if manifest["schema_version"] > SCHEMA_VERSION:
        _refuse_newer(folder, manifest)
    if not all(_NAME.fullmatch(name) for name in manifest["files"]):
        raise _DamagedError(f"{path} names files outside its folder")
    return {name: (size, digest) for name, (size, digest) in manifest["files"].items()}


def _refuse_newer(folder: Path, manifest: Mapping[str, Any]) -> None:
    raise CheckpointError(
        f"{folder} has checkpoint schema {manifest['schema_version']}, this fdfo_engine reads up to {SCHEMA_VERSION}: "
        f"install fdfo-engine {manifest.get('fdfo_engine')} or later, or name an older checkpoint"
    )


def _verify_file(path: Path, size: int, digest: str) -> None:
    _require_own_file(path)
    actual = path.stat().st_size
    if actual != size:
        raise _DamagedError(f"{path} has {actual} bytes, was written with {size}")
    found = sha256_of(path)
    if found != digest:
        raise _DamagedError(f"{path} has SHA-256 {found}, was written with {digest}")


def _require_own_file(path: Path) -> None:
    if path.is_symlink():
        raise _DamagedError(f"{path} is a link, and was written as a file")
    if not path.is_file():
        raise _DamagedError(f"{path} is missing")


def _require_plain_names(names: list[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name) or _SHARD.search(name):
            raise ValueError(f"checkpoint or file name {name!r}: takes letters, digits, '_', '-' and '.', no shard's")


def _size(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    return _HEADER_BYTES + sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())


def _remove(path: Path) -> None:
    def note(_function: Callable[..., Any], where: str, reason: Any) -> None:
        warn(f"{where} could not be removed: {reason[1]}")

    if path.exists():
        shutil.rmtree(path, onerror=note)


def _listing(names: list[str]) -> str:
    return ", ".join(names) or "none"
