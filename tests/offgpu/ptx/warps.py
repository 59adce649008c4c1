"""Instructions that the threads of a warp execute together."""

import re

import numpy as np
from offgpu.ptx.numbers import FLOATS, from_bits
from offgpu.ptx.program import PtxError
from offgpu.ptx.table import entry

TABLE = {}
WARP = 32


@entry(TABLE, "shfl", "sync bfly down up idx")
def _shuffle(machine, instruction):
    """Each lane reads a register of another lane of its segment, or its own where that is beyond the segment."""
    machine.whole_warps()
    mode, (into, source, by, limits, _members) = instruction.modifiers[1], instruction.operands
    values, by, limits = (machine.spread(each, "b32").reshape(-1, WARP) for each in (source, by, limits))
    by, limits, lane = by.astype(np.int64), limits.astype(np.int64), np.arange(WARP)
    segment, clamp = limits >> 8 & 31, limits & 31
    first, last = lane & segment, lane & segment | clamp & ~segment & 31
    chosen = {"bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": first | by & ~segment & 31}[mode]
    inside = chosen >= last if mode == "up" else chosen <= last
    found = np.take_along_axis(values, np.where(inside, chosen, lane), 1).reshape(-1)
    register, *is_inside = into if isinstance(into, tuple) else (into,)
    machine.put(register, found, "b32")
    for predicate in is_inside:
        machine.put(predicate, inside.reshape(-1), "pred")


@entry(TABLE, "ldmatrix", "sync aligned m8n8 x1 x4 trans shared")
def _load_matrices(machine, instruction):
    """8 x 8 matrices of 16 bits, whose rows lie where 8 lanes each say: lane t gets two elements of row t / 4."""
    machine.whole_warps()
    into, address = instruction.operands
    for register, memory, at, stamp in _rows_of_matrices(machine, address, into):
        rows = memory.load(at, 16, stamp)
        matrix = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 8, 8)
        if "trans" in instruction.modifiers:
            matrix = matrix.transpose(0, 2, 1)
        elements = np.ascontiguousarray(matrix).view(np.uint32).reshape(-1)
        machine.put(register, machine.for_all(elements), "b32")


@entry(TABLE, "stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared")
def _store_matrices(machine, instruction):
    """The other way round."""
    machine.whole_warps()
    address, source = instruction.operands
    for register, memory, at, stamp in _rows_of_matrices(machine, address, source):
        matrix = machine.of_active(machine.spread(register, "b32")).view(np.uint16).reshape(-1, 8, 8)
        if "trans" in instruction.modifiers:
            matrix = matrix.transpose(0, 2, 1)
        rows = np.ascontiguousarray(matrix).reshape(-1, 8).view(np.uint8)
        memory.store(at, rows, stamp)


def _rows_of_matrices(machine, address, registers):
    """Each register with the memory, the places and the stamps of its matrix's rows: 8 lanes of a warp say them."""
    memory, at = machine.places("shared", machine.address(address))
    at, stamp = at.reshape(-1, WARP), machine.of_active(machine.stamp).reshape(-1, WARP)
    for i, register in enumerate(registers):
        lanes = slice(8 * i, 8 * i + 8)
        yield register, memory, at[:, lanes].reshape(-1), stamp[:, lanes].reshape(-1)


LANE, ELEMENT = np.meshgrid(np.arange(WARP), np.arange(8), indexing="ij")
ROW, COLUMN = LANE // 4, LANE % 4 * 2
"""Of m16n8k16, by PTX's manual: lane l holds two neighbours of row l / 4, from column 2 (l % 4), in each register."""

A_ROWS, A_COLUMNS = ROW + ELEMENT // 2 % 2 * 8, COLUMN + ELEMENT % 2 + ELEMENT // 4 * 8
B_ROWS, B_COLUMNS = (COLUMN + ELEMENT % 2 + ELEMENT // 2 * 8)[:, :4], ROW[:, :4]
C_ROWS, C_COLUMNS = (ROW + ELEMENT // 2 * 8)[:, :4], (COLUMN + ELEMENT % 2)[:, :4]


@entry(TABLE, "mma", "sync aligned m16n8k16 row col")
def _multiply_matrices(machine, instruction):
    """c + a b, in float64 and rounded once: [16, 8] = [16, 8] + [16, 16] [16, 8] of each warp."""
    machine.whole_warps()
    into, *operands = instruction.operands
    *_, of_result, of_a, of_b, of_c = instruction.modifiers
    if (of_result, of_c, of_a == of_b) != ("f32", "f32", True) or not re.match(r"b?f16$", of_a):
        raise PtxError("a product of other types than 16-bit floats into float32 is not known")
    a = _matrix(machine, operands[0], of_a, (16, 16), (A_ROWS, A_COLUMNS))
    b = _matrix(machine, operands[1], of_b, (16, 8), (B_ROWS, B_COLUMNS))
    c = _matrix(machine, operands[2], "f32", (16, 8), (C_ROWS, C_COLUMNS))
    found = (c + a @ b).astype(np.float32)[:, C_ROWS, C_COLUMNS].reshape(machine.threads, 4)
    for i, register in enumerate(into):
        machine.put(register, found[:, i], "f32")


def _matrix(machine, registers, kind, shape, places):
    """The matrices, `[warps, *shape]` in float64, whose elements lie in registers of all lanes."""
    packed = kind if kind in FLOATS and kind != "f16" else f"{kind}x2"
    columns = [from_bits(machine.spread(register, "b32"), packed) for register in registers]
    elements = np.stack(columns, 1).reshape(-1, WARP, places[0].shape[1])
    found = np.zeros((len(elements), *shape))
    found[:, places[0], places[1]] = elements
    return found
