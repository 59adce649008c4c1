"""Runs a program: all threads of a launch take a step together, those at the earliest instruction first.

Registers are numpy arrays of one number a thread. Threads in step would hide a missing barrier, so memory is told who
accesses it, and between which barriers (`memory.py`).
"""

import numpy as np
from offgpu.ptx import arithmetic, data_movement, warpgroups, warps
from offgpu.ptx.memory import Memory, stamps
from offgpu.ptx.numbers import PACKED, from_bits, number_bits, to_bits, unsigned
from offgpu.ptx.pending import Pending
from offgpu.ptx.program import Immediate, PtxError

WARP = 32
CONTROL = {"bra": (None, {"uni"}), "ret": (None, set()), "bar": (None, {"sync", "warp"})}
TABLE = arithmetic.TABLE | data_movement.TABLE | warps.TABLE | warpgroups.TABLE | CONTROL
"""What executes an instruction, by name, and the modifiers that it knows beside types; `CONTROL` is the machine's."""

KINDS = {"pred", *(f"{kind}{bits}" for kind in "bsu" for bits in (8, 16, 32, 64)), "f16", "f32", "f64", "bf16"}
KINDS |= set(PACKED)


class Machine:
    """One launch. `parameters` are the kernel's, as bytes; `tensors` is the memory they point into.

    Attributes:
        threads: how many there are in all. block: of each thread. active: those that execute the present instruction, a
            mask, or None for all. stamp: says to memory who accesses it.
    """

    def __init__(self, program, grid, block_threads, parameters, tensors, shared_bytes):
        check(program)
        self.program, self.parameters, self.tensors = program, np.frombuffer(parameters, np.uint8), tensors
        self.blocks = int(np.prod(grid))
        self.threads = self.blocks * block_threads
        lane = np.arange(self.threads)
        self.block, self.warp = lane // block_threads, lane % block_threads // WARP
        self.registers = _special_registers(grid, block_threads, self.block, lane % block_threads)
        self.shared_size = -(-(program.shared_bytes + shared_bytes) // 16) * 16
        self.shared = Memory("shared", self.blocks * self.shared_size, min_access(program, "shared"))
        self.shared.inside[:] = True
        self.barriers = np.zeros(self.blocks, np.int64)
        self.stamp = stamps(self.block, self.barriers[self.block], self.warp)
        self.active, self.alive = None, np.ones(self.threads, bool)
        self.copies, self.products = Pending(self.threads), Pending(self.threads)

    def run(self):
        """To the end of all threads."""
        self.ready, self.waiting = {0: self.alive.copy()}, {}
        with np.errstate(all="ignore"):
            while self.ready or self.waiting:
                if not self.ready:
                    self._release()
                at = min(self.ready)
                self._advance(at, self.ready.pop(at))

    def _advance(self, at, threads):
        """Executes from `at` on, until these threads part, wait or meet others."""
        everyone = threads.all()
        while True:
            instruction = self.program.code[at]
            guard = None if instruction.guard is None else self.value(instruction.guard, "pred") & threads
            if instruction.name in CONTROL:
                self._control(instruction, threads, threads if guard is None else guard)
                return
            if guard is None:
                self.active = None if everyone else threads
            else:
                self.active = None if guard.all() else guard
            if self.active is None or self.active.any():
                self._execute(instruction)
            at += 1
            if self.ready and at >= min(self.ready):
                self._go(at, threads)
                return

    def _execute(self, instruction):
        function, _ = TABLE[instruction.name]
        try:
            function(self, instruction)
        except PtxError as error:
            raise PtxError(f"{self.program.name}: {instruction.text}: {error}") from None

    def _control(self, instruction, threads, taken):
        if instruction.name == "bra":
            self._go(self.program.labels[instruction.operands[0]], taken)
            self._go(instruction.place + 1, threads & ~taken)
        elif instruction.name == "ret":
            self.alive &= ~taken
            self._go(instruction.place + 1, threads & ~taken)
        elif "warp" in instruction.modifiers:
            self._go(instruction.place + 1, threads)  # a warp is in step
        elif instruction.operands != (Immediate(0),) or (taken != threads).any():
            raise PtxError(f"{self.program.name}: {instruction.text}: only whole blocks at barrier 0 are known")
        elif self._whole_blocks(threads):
            self._pass_barrier(instruction.place + 1, threads)
        else:
            place = instruction.place
            self.waiting[place] = threads | self.waiting.get(place, False)

    def _go(self, place, threads):
        if threads.any():
            self.ready[place] = threads | self.ready.get(place, False)

    def _release(self):
        """Nobody can go on: those at barriers do, if their blocks are there."""
        for place, threads in self.waiting.items():
            if not self._whole_blocks(threads):
                raise PtxError(f"{self.program.name}: some threads of a block wait at a barrier, others never come")
            self._pass_barrier(place + 1, threads)
        self.waiting = {}

    def _whole_blocks(self, threads):
        there, needed = (np.bincount(self.block[mask], minlength=self.blocks) for mask in (threads, self.alive))
        return ((there == 0) | (there == needed)).all()

    def _pass_barrier(self, place, threads):
        self.barriers[np.unique(self.block[threads])] += 1
        self.stamp = stamps(self.block, self.barriers[self.block], self.warp)
        self._go(place, threads)

    def value(self, operand, kind):
        """An operand as numbers of `kind`: one a thread, or one for all of them."""
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.array(operand.value != 0)
            return from_bits(np.array(operand.value & (1 << number_bits(kind)) - 1, unsigned(number_bits(kind))), kind)
        bits = self.registers.get(operand.name)
        if bits is None:
            raise PtxError(f"register {operand.name} is read before it is written")
        if kind == "pred":
            return ~bits if operand.negated else bits
        return from_bits(bits.astype(unsigned(number_bits(kind)), copy=False), kind)

    def spread(self, operand, kind):
        """The same with one number a thread in any case."""
        return np.ascontiguousarray(np.broadcast_to(self.value(operand, kind), self.threads))

    def put(self, register, values, kind):
        """Writes the register of the active threads: numbers of `kind`, extended to its width by their sign."""
        if register.name == "_":
            return
        bits = values if register.bits == 1 else to_bits(values, kind, register.bits)
        if self.active is not None:
            unset = ~np.zeros((), bits.dtype)  # NaN as a float
            bits = np.where(self.active, bits, self.registers.get(register.name, unset))
        self.registers[register.name] = np.broadcast_to(bits, self.threads)

    def address(self, operand):
        """Of each active thread."""
        if operand.base is None:
            return np.full(self.count(), operand.offset)
        return self.of_active(self.registers[operand.base.name]).astype(np.int64) + operand.offset

    def of_active(self, values):
        """The rows of active threads."""
        return values if self.active is None else values[self.active]

    def count(self):
        """How many threads are active."""
        return self.threads if self.active is None else int(self.active.sum())

    def for_all(self, rows):
        """The inverse of `of_active`, with zeros for the other threads."""
        if self.active is None:
            return rows
        found = np.zeros((self.threads, *rows.shape[1:]), rows.dtype)
        found[self.active] = rows
        return found

    def places(self, space, address):
        """The memory of a space, and where addresses of the active threads lie in it."""
        if space == "global":
            return self.tensors, address
        if ((address < 0) | (address >= self.shared_size)).any():
            raise PtxError(f"shared memory: out of bounds of its {self.shared_size} bytes")
        return self.shared, address + self.of_active(self.block) * self.shared_size

    def mask(self):
        """The active threads as a mask."""
        return np.ones(self.threads, bool) if self.active is None else self.active

    def finish(self, pending, newest):
        """The active threads wait for what they began, but for their newest groups."""
        waiting = self.active
        for threads, finish in pending.due(self.mask(), newest):
            self.active = None if threads.all() else threads
            finish()
        self.active = waiting

    def whole_warps(self):
        """An error if some of a warp are not there."""
        active = self.mask().reshape(-1, WARP)
        if (active.any(1) != active.all(1)).any():
            raise PtxError("only some threads of a warp are there")


def check(program):
    """Refuses a program with an instruction that is not in the table, before it runs."""
    for instruction in program.code:
        if instruction.name not in TABLE:
            raise PtxError(f"{program.name}: {instruction.text}: {instruction.name} is not known")
        _, known = TABLE[instruction.name]
        if unknown := set(instruction.modifiers) - known - KINDS:
            raise PtxError(f"{program.name}: {instruction.text}: {sorted(unknown)} of {instruction.name} is not known")


def min_access(program, space):
    """Bytes of the smallest access to a space: loads, stores and atomics."""
    widths = [4]
    for instruction in program.code:
        if instruction.name in ("ld", "st", "atom") and space in instruction.modifiers:
            widths.append(number_bits(instruction.modifiers[-1]) // 8)
    return min(widths)


def _special_registers(grid, block_threads, block, thread):
    x, y, _ = grid
    one, none = np.ones(len(block)), np.zeros(len(block))
    numbers = {
        "%tid": (thread, none, none),
        "%ntid": (block_threads * one, one, one),
        "%ctaid": (block % x, block // x % y, block // (x * y)),
        "%nctaid": [size * one for size in grid],
    }
    found = {f"{name}.{axis}": each for name, axes in numbers.items() for axis, each in zip("xyz", axes, strict=True)}
    return {name: each.astype(np.uint32) for name, each in (found | {"%laneid": thread % WARP}).items()}
