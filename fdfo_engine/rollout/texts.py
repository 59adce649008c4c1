"""Many texts, for a list of prompts of any length: their sizes in memory, what they say on disk once it is much."""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt

from fdfo_engine.runtime.durable import storage_error

_IN_MEMORY = 8 << 20
_BLOCK = 64
"""Texts for which one position is kept; within a block sizes are added up."""
_AT_ONCE = 16 * _BLOCK
"""Texts that are read together when all are gone through."""


class Texts(Sequence[str]):
    """Texts in their order, as a list that never changes; ten million take 50 MB of memory.

    What exceeds 8 MB lies in a temporary file without a name, which ends with the object. Safe to read from many
    threads, and in a forked process.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Takes `texts` one by one, so that a generator's are never all in memory.

        Raises:
            CheckpointError: there is no room for the temporary file.
        """
        self._sizes, self._starts = array("I"), array("Q")
        self._unwritten, self._on_disk = bytearray(), 0
        self._file: IO[bytes] | None = None
        for text in texts:
            self._add(text.encode())

    def _add(self, data: bytes) -> None:
        if len(self._sizes) % _BLOCK == 0:
            self._starts.append(self._on_disk + len(self._unwritten))
        self._sizes.append(len(data))
        self._unwritten += data
        if len(self._unwritten) > _IN_MEMORY:
            self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.write(self._unwritten)
            self._file.flush()
        except OSError as error:
            raise storage_error(Path(tempfile.gettempdir()), error) from error
        self._on_disk += len(self._unwritten)
        self._unwritten.clear()

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """A text, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        first = number // _BLOCK * _BLOCK
        begin = self._starts[number // _BLOCK] + sum(self._sizes[first:number])
        return self._bytes(begin, begin + self._sizes[number]).decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_ONCE):
            sizes = self._sizes[first : first + _AT_ONCE]
            position = self._starts[first // _BLOCK]
            data, end = self._bytes(position, position + sum(sizes)), 0
            for size in sizes:
                yield data[end : end + size].decode()
                end += size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Texts, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Texts({len(self)})"

    def _bytes(self, begin: int, end: int) -> bytes:
        data = b""
        if self._file is not None and begin < self._on_disk:
            data = os.pread(self._file.fileno(), min(end, self._on_disk) - begin, begin)
        return data + self._unwritten[max(begin - self._on_disk, 0) : max(end - self._on_disk, 0)]


def order_of(words: Iterable[npt.NDArray[Any]], count: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """The order that sorts `count` words of 32 bits, equal ones as they stand, and which word repeats the one before.

    Sorted in place together with their places: an argsort of as many takes twice the room.

    Args:
        words: integers in 0..2^32-1, in parts.
        count: how many there are in all, below 2^32.

    Returns:
        uint32 `[count]`, and of the sorted words bool `[count - 1]`.
    """
    keys = np.empty(count, dtype=np.uint64)
    place = 0
    for part in words:
        keys[place : place + len(part)] = part.astype(np.uint64) << 32 | np.arange(
            place, place + len(part), dtype=np.uint64
        )
        place += len(part)
    keys.sort()
    order = keys.astype(np.uint32)
    np.right_shift(keys, 32, out=keys)
    return order, keys[1:] == keys[:-1]


def repeated(texts: Texts) -> npt.NDArray[np.bool_]:
    """Which of `texts` stood among them before, bool `[len(texts)]`.

    Texts are sorted by four bytes of a hash, and compared in full where those are equal.
    """
    hashes = (hash(text) & 0xFFFFFFFF for text in texts)
    parts = (np.fromiter(itertools.islice(hashes, _AT_ONCE), np.uint32) for _ in range(0, len(texts), _AT_ONCE))
    order, repeats_hash = order_of(parts, len(texts))
    is_repeated = np.zeros(len(texts), dtype=np.bool_)
    seen: set[str] = set()
    last = -2
    for place in map(int, np.flatnonzero(repeats_hash)):
        if place != last + 1:
            seen = {texts[order[place]]}
        text = texts[order[place + 1]]
        is_repeated[order[place + 1]] = text in seen
        seen.add(text)
        last = place
    return is_repeated
