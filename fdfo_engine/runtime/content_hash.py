"""SHA-256 of files of gigabytes, taken once and then remembered in the user's cache.

A hash counts as long as the file's size, inode and both times of change are what they were. The time of the last change
of status (ctime) cannot be set back, so that a file replaced by one of equal size and date is noticed too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.durable import replace_file, sha256_of
from fdfo_engine.runtime.environment import user_cache
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.json_text import json_object

REMEMBERED_FROM_BYTES = 1 << 20
"""Smaller files are read at each start: nothing about them is taken on trust."""

_SETTLED_AFTER_NS = 2 * 10**9
"""A file changed less than this ago may change again without its times telling."""

_TOLD_FROM_BYTES = 1 << 30
_THREADS = 4
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def content_hashes(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file's content, as hexadecimal digits, in order.

    A blob of the hub's cache bears its own SHA-256 as its name: that is taken unread, unless the blob is known to have
    changed since it was first seen. Processes on one machine don't hash the same file at the same time.

    Raises:
        OSError: a file cannot be read.
    """
    found = {file: _known_hash(file) for file in files}
    unknown = [file for file, digest in found.items() if digest is None]
    if any(_is_large(file) for file in unknown):
        with _one_process_at_a_time():
            found |= {file: _known_hash(file) for file in unknown}  # another process may have been faster
            found |= _hashed([file for file in unknown if found[file] is None])
    else:
        found |= _hashed(unknown)
    return [str(found[file]) for file in files]


def _hashed(files: Sequence[Path]) -> dict[Path, str]:
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes >= _TOLD_FROM_BYTES:
        say(f"taking the SHA-256 of {len(files)} files, {num_bytes / 1e9:.1f} GB, once; it is remembered")
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(_hash_and_remember, files), strict=True))


def _hash_and_remember(file: Path) -> str:
    before = _marks(file)
    digest = sha256_of(file)
    last_change_ns = max(before["mtime_ns"], before["ctime_ns"])
    is_settled = time.time_ns() - last_change_ns > _SETTLED_AFTER_NS and _marks(file) == before
    if is_settled and _is_large(file):
        _remember(file, before, digest)
    return digest


def _is_large(file: Path) -> bool:
    return file.stat().st_size >= REMEMBERED_FROM_BYTES


def _known_hash(file: Path) -> str | None:
    """The hash of a large file, as far as it is known without reading the file."""
    if not _is_large(file):
        return None
    marks = _marks(file)
    remembered = _read_entry(file)
    if remembered is not None:
        return str(remembered["sha256"]) if remembered["marks"] == marks else None
    name = _hub_name(file)
    if name is not None:
        _remember(file, marks, name)
    return name


def _hub_name(file: Path) -> str | None:
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and _HUB_BLOB.fullmatch(blob.name) else None


def _marks(file: Path) -> dict[str, int]:
    status = file.stat()
    return {
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _entry_file(file: Path) -> Path:
    return user_cache("hashes") / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()}.json"


def _read_entry(file: Path) -> dict[str, Any] | None:
    """What is remembered of `file`; None for nothing, or for an entry that is not as it was written."""
    try:
        entry = json_object(_entry_file(file).read_bytes())
        check = entry.pop("check")
    except (OSError, ValueError, KeyError):
        return None
    return entry if check == _check(entry) else None


def _remember(file: Path, marks: dict[str, int], digest: str) -> None:
    entry: dict[str, Any] = {"path": str(file.resolve()), "marks": marks, "sha256": digest}
    try:
        kept = _entry_file(file)
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, json.dumps({**entry, "check": _check(entry)}).encode())
    except (OSError, CheckpointError) as error:
        warn(f"{file}: its SHA-256 is not remembered, and will be taken again: {error}")


def _check(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """Holds a lock in the cache; none where that cannot be written: each process then hashes for itself."""
    lock = _locked()
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _locked() -> BinaryIO | None:
    try:
        folder = user_cache("hashes")
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a network filesystem without locks
        file.close()
        return None
    return file
