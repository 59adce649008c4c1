"""Memory of a launch as bytes, of which each knows who wrote and who read it: wrong accesses are errors, not values."""

import numpy as np
from offgpu.ptx.program import PtxError

BLOCK_SHIFT, INTERVAL_SHIFT = 40, 8
SEVERAL_WARPS, SEVERAL_BLOCKS = 255, -1
POISON = 0xFF
"""Of what nobody wrote: NaN as a float of any width."""


def stamps(block, interval, warp):
    """Who accesses: a warp of a block, and how many barriers the block has passed. 0 is nobody."""
    return block << BLOCK_SHIFT | interval << INTERVAL_SHIFT | warp + 1


def _unordered(before, now):
    """Whether no barrier stands between these accesses, and they are not those of one warp."""
    apart = (before ^ now) >> BLOCK_SHIFT != 0
    together = before >> INTERVAL_SHIFT == now >> INTERVAL_SHIFT
    return (before != 0) & (before != now) & (apart | together)


def _joined(before, now):
    """The stamp of readers: the newest, or that there were several whom no barrier orders."""
    apart = (before ^ now) >> BLOCK_SHIFT != 0
    return np.where(_unordered(before, now), np.where(apart, SEVERAL_BLOCKS, now | SEVERAL_WARPS), now)


class Memory:
    """`size` bytes, of which accesses take at least `grain` at once.

    Attributes:
        data: the bytes. inside: those that may be accessed.
    """

    def __init__(self, space, size, grain):
        self.space, self.grain = space, grain
        size = -(-size // 16) * 16
        self.data, self.inside = np.full(size, POISON, np.uint8), np.zeros(size, bool)
        self.writers, self.readers = np.zeros(size // grain, np.int64), np.zeros(size // grain, np.int64)

    def load(self, at, size, stamp, *, ordered=False):
        """`[lanes, size]` bytes from `at`. `ordered` if something else than barriers orders it: not looked at."""
        self._check(at, size)
        if not ordered:
            grains = self._grains(at, size)
            writers, now = self.writers[grains], stamp[:, None]
            if _unordered(writers, now).any():
                raise PtxError(f"race in {self.space} memory: read while another warp writes it, without a barrier")
            if self.space == "shared" and (writers == 0).any():
                raise PtxError("shared memory is read that nobody wrote")
            self._note_readers(grains, now)
        return self._units(size)[at // size].view(np.uint8).reshape(-1, size)

    def store(self, at, data, stamp):
        """Writes the rows of `data`, bytes, to `at`."""
        size = data.shape[1]
        self._check(at, size)
        units, new = self._units(size), np.ascontiguousarray(data).view(f"V{size}")[:, 0]
        differs = (units[at // size].view(np.uint8).reshape(data.shape) != data).any(1)
        self._claim(at, size, stamp, differs)
        units[at // size] = new
        if (units[at // size].view(np.uint8).reshape(data.shape) != data).any():
            raise PtxError(f"race in {self.space} memory: threads write different values to one address at once")

    def reserve(self, at, size, stamp):
        """Of a copy that runs on its own: until its data is stored, what lies there is no value."""
        self._check(at, size)
        self._claim(at, size, stamp, np.ones(len(at), bool))
        self._units(size)[at // size] = np.full(size, POISON, np.uint8).view(f"V{size}")

    def add(self, at, values):
        """Adds one after the other and returns what each found."""
        size = values.dtype.itemsize
        self._check(at, size)
        numbers, found = self.data.view(values.dtype), np.empty_like(values)
        for i, place in enumerate(at // size):
            found[i] = numbers[place]
            numbers[place] += values[i]
        return found

    def _claim(self, at, size, stamp, differs):
        grains, now = self._grains(at, size), stamp[:, None]
        for others, doing in ((self.writers, "writes"), (self.readers, "reads")):
            if (_unordered(others[grains], now).any(1) & differs).any():
                raise PtxError(f"race in {self.space} memory: written while another warp {doing} it, without a barrier")
        self.writers[grains] = now

    def _note_readers(self, grains, now):
        joined = _joined(self.readers[grains], now)
        self.readers[grains] = joined
        kept = self.readers[grains]
        if (kept != joined).any():  # an address that several lanes read at once
            self.readers[grains] = _joined(kept, joined)

    def _check(self, at, size):
        if (at % size).any():
            raise PtxError(f"{self.space} memory: {size} bytes at an address that is no multiple of {size}")
        outside = (at < 0) | (at + size > len(self.data))
        if not outside.any():
            outside = ~self.inside[at[:, None] + np.arange(0, size, self.grain)].all(1)
        if outside.any():
            raise PtxError(f"{self.space} memory: {int(outside.sum())} threads access {size} bytes out of bounds")

    def _grains(self, at, size):
        return at[:, None] // self.grain + np.arange(size // self.grain)

    def _units(self, size):
        return self.data[: len(self.data) // size * size].view(f"V{size}")
