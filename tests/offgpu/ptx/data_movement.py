"""Instructions that move numbers: between registers, and to and from memory."""

import numpy as np
from offgpu.ptx.numbers import UNSIGNED, number_bits
from offgpu.ptx.program import Immediate, PtxError
from offgpu.ptx.table import entry

TABLE = {}
SPACES = ("shared", "global", "param")


@entry(TABLE, "mov")
def _move(machine, instruction):
    kind, (into, source) = instruction.modifiers[-1], instruction.operands
    if isinstance(source, tuple):
        machine.put(into, _packed(machine, source, kind), kind)
    elif isinstance(into, tuple):
        _unpack(machine, into, machine.spread(source, kind))
    else:
        machine.put(into, machine.value(source, kind), kind)


def _packed(machine, parts, kind):
    part = number_bits(kind) // len(parts)
    columns = [machine.spread(each, f"b{part}") for each in parts]
    return np.stack(columns, 1).view(UNSIGNED[number_bits(kind)])[:, 0]


def _unpack(machine, parts, values):
    bits = values.itemsize * 8 // len(parts)
    columns = np.ascontiguousarray(values)[:, None].view(UNSIGNED[bits])
    for register, column in zip(parts, columns.T, strict=True):
        machine.put(register, column, f"b{bits}")


@entry(TABLE, "ld", "param global shared volatile v2 v4")
def _load(machine, instruction):
    kind, (into, address) = instruction.modifiers[-1], instruction.operands
    registers = into if isinstance(into, tuple) else (into,)
    size = number_bits(kind) // 8 * len(registers)
    space = space_of(instruction)
    if space == "param":
        rows = machine.parameters[machine.address(address)[:, None] + np.arange(size)]
    else:
        memory, at = machine.places(space, machine.address(address))
        ordered = "volatile" in instruction.modifiers
        rows = memory.load(at, size, machine.of_active(machine.stamp), ordered=ordered)
    numbers = np.ascontiguousarray(machine.for_all(rows)).view(UNSIGNED[number_bits(kind)])
    for register, column in zip(registers, numbers.T, strict=True):
        machine.put(register, column, kind)


@entry(TABLE, "st", "global shared v2 v4")
def _store(machine, instruction):
    kind, (address, source) = instruction.modifiers[-1], instruction.operands
    parts = source if isinstance(source, tuple) else (source,)
    columns = np.stack([machine.of_active(machine.spread(part, f"b{number_bits(kind)}")) for part in parts], 1)
    memory, at = machine.places(space_of(instruction), machine.address(address))
    memory.store(at, columns.view(np.uint8), machine.of_active(machine.stamp))


def space_of(instruction):
    """Which memory an instruction names."""
    found = [space for space in SPACES if space in instruction.modifiers]
    if not found:
        raise PtxError("an address in no space is not known")
    return found[0]


@entry(TABLE, "atom", "global gpu acq_rel add")
def _atomic(machine, instruction):
    kind, (into, address, value) = instruction.modifiers[-1], instruction.operands
    memory, at = machine.places(space_of(instruction), machine.address(address))
    found = memory.add(at, machine.of_active(machine.spread(value, kind)))
    machine.put(into, machine.for_all(found), kind)


@entry(TABLE, "cp", "async ca cg shared global commit_group wait_group")
def _copy(machine, instruction):
    if "commit_group" in instruction.modifiers:
        machine.copies.commit(machine.mask())
    elif "wait_group" in instruction.modifiers:
        machine.finish(machine.copies, instruction.operands[0].value)
    else:
        _begin_copy(machine, *instruction.operands)


def _begin_copy(machine, into, source, size, given=None):
    """Reads now, and writes when it is waited for: `given` of `size` bytes, which is all or none, and zeros."""
    size = size.value
    length = machine.of_active(machine.spread(given or Immediate(size), "u32"))
    if ((length != 0) & (length != size)).any():
        raise PtxError("a copy of some of its bytes is not known")
    tensors, start = machine.places("global", machine.address(source))
    stamp, some = machine.of_active(machine.stamp), length > 0
    data = np.zeros((len(start), size), np.uint8)
    data[some] = tensors.load(start[some], size, stamp[some])
    memory, at = machine.places("shared", machine.address(into))
    memory.reserve(at, size, stamp)
    at, data = machine.for_all(at), machine.for_all(data)

    def arrive():
        memory.store(machine.of_active(at), machine.of_active(data), machine.of_active(machine.stamp))

    machine.copies.begin(machine.mask(), arrive)
