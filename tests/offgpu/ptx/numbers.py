"""Numbers of PTX's types as numpy arrays, and back to the bits that a register holds.

bfloat16, which numpy lacks, is taken as float32. A packed pair of floats is an array with a last axis of 2.
"""

import functools
import re

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
PACKED = ("f16x2", "bf16x2", "f32x2")


def unsigned(bits):
    """numpy's type of so many bits."""
    return UNSIGNED[bits]


@functools.cache
def number_bits(kind):
    """Width of a type, both of a packed pair."""
    if kind in PACKED:
        return 2 * number_bits(kind[:-2])
    return int(re.sub(r"\D", "", kind))


def is_float(kind):
    """Whether it is a float, packed or not."""
    return kind.startswith(("f", "bf"))


def from_bits(bits, kind):
    """Unsigned numbers of the type's width, read as numbers of the type."""
    if kind in PACKED:
        halves = np.ascontiguousarray(bits).view(UNSIGNED[number_bits(kind) // 2])
        return from_bits(halves.reshape(*bits.shape, 2), kind[:-2])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in FLOATS:
        return bits.view(FLOATS[kind])
    return bits.view(SIGNED[number_bits(kind)]) if kind[0] == "s" else bits


def to_bits(values, kind, width):
    """Numbers, rounded to the type, as unsigned ones of `width` bits: extended by their sign, or by zeros."""
    values = np.asarray(values)
    if kind in PACKED:
        halves = to_bits(values, kind[:-2], number_bits(kind) // 2)
        return np.ascontiguousarray(halves).view(UNSIGNED[number_bits(kind)])[..., 0]
    if kind == "bf16":
        bits = _bfloat16(values.astype(np.float32))
    elif kind in FLOATS:
        bits = values.astype(FLOATS[kind]).view(UNSIGNED[number_bits(kind)])
    elif kind[0] == "s":
        bits = values.astype(SIGNED[number_bits(kind)]).astype(SIGNED[width])
    else:
        bits = values.astype(UNSIGNED[number_bits(kind)], copy=False)
    return bits.astype(UNSIGNED[width], copy=False)


def _bfloat16(values):
    """To nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
