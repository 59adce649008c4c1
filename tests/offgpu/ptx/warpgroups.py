"""Matrix products that four warps execute together, on sm_90: operands lie in shared memory, where descriptors say.

A fence that is missing between what threads wrote and what a product reads is not noticed: here all memory is one.
"""

import re

import numpy as np
from offgpu.ptx.numbers import from_bits
from offgpu.ptx.program import PtxError
from offgpu.ptx.table import entry
from offgpu.ptx.warps import A_COLUMNS, A_ROWS

TABLE = {}
GROUP, ROWS, INNER = 128, 64, 16
SHAPES = {f"m64n{columns}k16": columns for columns in range(8, 257, 8)}
UNIT = 16
"""Bytes of 8 elements that lie together, whatever the swizzle."""

SWIZZLED_ROW = {1: 128, 2: 64, 3: 32}
"""Bytes of a row of 8 x 8 elements, by the descriptor's mode; the other mode has no swizzle."""


@entry(TABLE, "fence", "proxy async shared::cta")
def _fence(machine, instruction):
    """Orders what threads wrote before what products read: nothing to do."""


@entry(TABLE, "wgmma", f"fence mma_async commit_group wait_group sync aligned {' '.join(SHAPES)}")
def _multiply(machine, instruction):
    action = instruction.modifiers[0]
    if action == "commit_group":
        machine.products.commit(machine.mask())
    elif action == "wait_group":
        machine.finish(machine.products, instruction.operands[0].value)
    elif action == "mma_async":
        _whole_groups(machine)
        operands = _Operands(machine, instruction)
        operands.from_memory()  # it may be read from now on
        machine.products.begin(machine.mask(), operands.multiply)


def _whole_groups(machine):
    """A mask of the warpgroups that are active."""
    active = machine.mask().reshape(-1, GROUP)
    if (active.any(1) != active.all(1)).any():
        raise PtxError("only some threads of a warpgroup are there")
    return active[:, 0]


class _Operands:
    """Of d = a b + d, or a b where the predicate is false. Descriptors are read at once, the matrices are not."""

    def __init__(self, machine, instruction):
        *_, shape, of_result, of_a, of_b = instruction.modifiers
        if of_result != "f32" or of_a != of_b or not re.match(r"b?f16$", of_a):
            raise PtxError("a product of other types than 16-bit floats into float32 is not known")
        self.machine, self.kind, self.columns = machine, of_a, SHAPES[shape]
        self.into, self.a, b, adds, *more = instruction.operands
        if [sign.value for sign in more[:2]] != [1, 1]:
            raise PtxError("a product with a sign is not known")
        self.transposed = [bool(each.value) for each in more[2:]]
        self.b, self.adds = machine.spread(b, "b64"), machine.value(adds, "pred")
        if not isinstance(self.a, tuple):
            self.a = machine.spread(self.a, "b64")

    def from_memory(self):
        """Both matrices of the active warpgroups, `[groups, 64, 16]` and `[groups, 16, columns]`."""
        in_registers = isinstance(self.a, tuple)
        a = self.from_registers() if in_registers else self.matrix(self.a, ROWS, self.transposed[0])
        return a, self.matrix(self.b, self.columns, self.transposed[-1]).transpose(0, 2, 1)

    def from_registers(self):
        columns = [from_bits(self.machine.spread(register, "b32"), f"{self.kind}x2") for register in self.a]
        elements = np.stack(columns, 1).reshape(-1, GROUP, 8)[_whole_groups(self.machine)]
        found = np.zeros((len(elements), ROWS, INNER))
        found[:, _rows_of_warps(A_ROWS), np.tile(A_COLUMNS, (4, 1))] = elements
        return found

    def matrix(self, descriptors, size, transposed):
        """`[groups, size, 16]`: units lie along the inner axis, or along the other one if it is transposed."""
        groups = _whole_groups(self.machine)
        bits = descriptors.reshape(-1, GROUP)[groups, 0]
        outer, inner = _units(size, transposed)
        at = _addresses(bits, outer, inner, transposed)
        first = np.arange(self.machine.threads).reshape(-1, GROUP)[groups, 0]
        at += (self.machine.block[first] * self.machine.shared_size)[:, None]
        stamp = np.repeat(self.machine.stamp[first], at.shape[1])
        data = self.machine.shared.load(at.reshape(-1), UNIT, stamp)
        values = from_bits(np.ascontiguousarray(data).view(np.uint16), self.kind).astype(np.float64)
        if transposed:
            return values.reshape(len(bits), size // 8, INNER, 8).transpose(0, 1, 3, 2).reshape(len(bits), size, INNER)
        return values.reshape(len(bits), size, INNER)

    def multiply(self):
        """Writes d of the active warpgroups: in float64, rounded once."""
        machine, (a, b) = self.machine, self.from_memory()
        groups = _whole_groups(machine)
        rows, columns = _places_of_result(self.columns)
        product = np.zeros((len(groups), GROUP, self.columns // 2))
        product[groups] = (a @ b)[:, rows, columns]
        for register, values in zip(self.into, product.reshape(machine.threads, -1).T, strict=True):
            if self.adds.any():
                values = values + np.where(self.adds, machine.value(register, "f32"), np.float32(0))
            machine.put(register, values.astype(np.float32), "f32")


def _rows_of_warps(rows):
    """Warp w of a warpgroup has the rows from 16 w on."""
    return (16 * np.arange(4)[:, None, None] + rows).reshape(GROUP, -1)


def _places_of_result(columns):
    """Row and column of each register of each thread: as of m16n8k16, every 4 registers 8 columns on."""
    lane, register = np.meshgrid(np.arange(32), np.arange(columns // 2), indexing="ij")
    rows = lane // 4 + register // 2 % 2 * 8
    column = register // 4 * 8 + lane % 4 * 2 + register % 2
    return _rows_of_warps(rows), np.tile(column, (4, 1))


def _units(size, transposed):
    """Both places of each unit of 8 elements: the 8 along the inner axis, or along the other one if transposed."""
    shape = (size // 8, INNER) if transposed else (size, INNER // 8)
    return (each.reshape(-1) for each in np.indices(shape))


def _addresses(bits, outer, inner, transposed):
    """Of units in shared memory, `[groups, units]`, by the canonical layouts of PTX's manual."""
    fields = (bits >> np.uint64(place) & np.uint64(0x3FFF) for place in (0, 16, 32))
    start, leading, stride = (field.astype(np.int64)[:, None] * UNIT for field in fields)
    modes = np.unique(bits >> np.uint64(62))
    if len(modes) != 1 or int(modes[0]) not in SWIZZLED_ROW or (bits >> np.uint64(49) & np.uint64(7)).any():
        raise PtxError("a layout without a swizzle, or at an offset, is not known")
    row = SWIZZLED_ROW[int(modes[0])]
    across = row // UNIT
    if transposed:
        offset = outer % across * UNIT + outer // across * leading + inner % 8 * row + inner // 8 * stride
    else:
        offset = outer % 8 * row + outer // 8 * stride + inner * UNIT
    at = start + offset
    return at ^ (at >> 7 & across - 1) << 4
