"""Files that survive a crash: written whole and synced, or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fdfo_engine.runtime import pulse
from fdfo_engine.runtime.errors import CheckpointError, UsageError

_CHUNK_BYTES = 1 << 22


def sync_folder(folder: Path) -> None:
    """Makes names created, renamed or removed in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network filesystems cannot sync a folder, and need not
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Makes the contents of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, in place, and syncs it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` atomically: a reader, or a restart after a crash, sees the old or the new file whole.

    Raises:
        CheckpointError: the storage refuses; `path` is as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # of a storage that is gone; the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def remove_leftovers(folder: Path) -> None:
    """Removes what `replace_file` left in `folder` when its process was killed; of a process that lives it stays."""
    for path in folder.glob(".tmp-*"):
        writer = path.name.rpartition("-")[2]
        if path.is_file() and writer.isdecimal() and not Path("/proc", writer).exists():
            path.unlink(missing_ok=True)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends `record` to a JSONL file as one whole, synced line; non-finite numbers become null.

    Raises:
        CheckpointError: the storage refuses; the file ends where it ended.
    """
    line = (json.dumps(plain_json(record), allow_nan=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            append_whole(file.fileno(), line, file.seek(0, os.SEEK_END))
    except OSError as error:
        raise storage_error(path, error) from error


def append_whole(descriptor: int, data: bytes, size: int, *, synced: bool = True) -> None:
    """Appends `data` to a file of `size` bytes; where that fails the file ends where it ended.

    Raises:
        OSError: the storage refuses.
    """
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, "short write")
        if synced:
            os.fsync(descriptor)
    except OSError:
        with suppress(OSError):  # a storage that is gone does not do that either: readers take whole lines only
            os.ftruncate(descriptor, size)
        raise


def open_to_readers(folder: Path) -> None:
    """Gives the safetensors files under `folder` the permissions of any new file there (0666 without the umask).

    safetensors itself leaves them to their owner alone, whatever the umask.
    """
    probe = folder / f".mode-{os.getpid()}"
    probe.touch(exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        if stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


def plain_json(value: Any) -> Any:
    """`value` with NaN and infinities as None, and mapping keys as text, so that every JSON reader takes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return value


def sealed_json(record: Mapping[str, Any], key: str) -> bytes:
    """The one text of `record`, with its SHA-256 as `key` in it: who encodes what he read notices any flipped bit."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, key: digest}, indent=1, sort_keys=True).encode()


def unsealed_json(path: Path, key: str) -> dict[str, Any]:
    """The record of which `sealed_json` made the text in `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: the text is not as it was written.
    """
    data = path.read_bytes()
    try:
        record: dict[str, Any] = json.loads(data)
        del record[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} ({len(data)} bytes) is no record of ours") from error
    if sealed_json(record, key) != data:
        raise ValueError(f"{path} is not as it was written")
    return record


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            pulse.got_on()
    return digest.hexdigest()


def require_room(folder: Path, num_bytes: int) -> None:
    """Checks that the storage of `folder` has `num_bytes` left.

    Raises:
        CheckpointError: it has less; says how much of both.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(f"no space left on {folder}: need {_megabytes(num_bytes)}, {_megabytes(free)} free")


def storage_error(path: Path, error: BaseException) -> CheckpointError:
    """The error to raise when the storage refused `path`: a full disk says so, anything else gives its reason."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    if full:
        folder = path if path.is_dir() else path.parent
        return CheckpointError(f"no space left on {folder}: {_megabytes(shutil.disk_usage(folder).free)} free")
    return CheckpointError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")


def _megabytes(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / 1e5) / 10:g} MB"


def refuse_filled(folder: Path, overwrite: bool, how: str = "overwrite=True") -> None:
    """A folder that holds something is only written to when asked; `how` to ask is what the message says."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; takes a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"{folder}: is not empty; choose another folder or pass {how}")
