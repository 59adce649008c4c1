"""Instructions that compute a number of each thread from numbers of the same thread."""

import numpy as np
from offgpu.ptx.numbers import FLOATS, PACKED, SIGNED, UNSIGNED, is_float, number_bits
from offgpu.ptx.program import PtxError
from offgpu.ptx.table import entry

TABLE = {}
SMALLEST_NORMAL = np.finfo(np.float32).tiny


def elementwise(names, modifiers=""):
    """Decorates a function of numbers, all of the instruction's last type."""

    def add(function):
        @entry(TABLE, names, modifiers)
        def execute(machine, instruction):
            kind = instruction.modifiers[-1]
            into, *operands = instruction.operands
            given = [flushed(instruction, machine.value(operand, kind)) for operand in operands]
            machine.put(into, flushed(instruction, rounded(function(*map(widened(kind), given)), kind)), kind)

        return function

    return add


def widened(kind):
    """Takes 16-bit floats to float32, in which one operation on them is exact enough to be rounded once."""
    half = kind in ("f16", "bf16", *PACKED)
    return (lambda values: values.astype(np.float64)) if half else lambda values: values


def rounded(values, kind):
    """A float result in numpy's type for it; 16-bit ones are rounded as they are written."""
    return values.astype(FLOATS[kind], copy=False) if kind in FLOATS else values


def flushed(instruction, values):
    """Zeros in the place of what is too small, with `.ftz`."""
    if "ftz" not in instruction.modifiers or values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


@elementwise("add", "rn ftz")
def _add(a, b):
    return a + b


@elementwise("sub", "rn ftz")
def _sub(a, b):
    return a - b


@elementwise("neg", "ftz")
def _neg(a):
    return -a


@elementwise("abs", "ftz")
def _abs(a):
    return np.abs(a)


@elementwise("min", "ftz")
def _min(a, b):
    return np.fmin(a, b)


@elementwise("max", "ftz")
def _max(a, b):
    return np.fmax(a, b)


@elementwise("and")
def _and(a, b):
    return a & b


@elementwise("or")
def _or(a, b):
    return a | b


@elementwise("xor")
def _xor(a, b):
    return a ^ b


@elementwise("not")
def _not(a):
    return ~a


@elementwise("sqrt", "rn approx ftz")
def _sqrt(a):
    return np.sqrt(a)


@elementwise("rsqrt", "approx ftz")
def _rsqrt(a):
    return 1 / np.sqrt(a.astype(np.float64))


@elementwise("rcp", "rn approx ftz")
def _rcp(a):
    return 1 / a


@elementwise("ex2", "approx ftz")
def _ex2(a):
    return np.exp2(a.astype(np.float64))


@elementwise("lg2", "approx ftz")
def _lg2(a):
    return np.log2(a.astype(np.float64))


@elementwise("tanh", "approx")
def _tanh(a):
    return np.tanh(a.astype(np.float64))


@elementwise("div", "rn full approx ftz")
def _div(a, b):
    if a.dtype.kind == "f":
        return a / b
    return _quotient(a, b)


@elementwise("rem")
def _rem(a, b):
    return a - _quotient(a, b) * b


def _quotient(a, b):
    """Toward zero; a division by zero gives some number, as on a GPU."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    down = a // divisor
    return down + ((down < 0) & (down * divisor != a)).astype(down.dtype)


@elementwise("fma", "rn ftz")
def _fma(a, b, c):
    if a.dtype == np.float32:
        return a.astype(np.longdouble) * b + c
    return _fma_of_doubles(a, b, c)


def _fma_of_doubles(a, b, c):
    """From the halves of both factors, whose products are exact; the largest first, against which c may cancel."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    exact = ((a1 * b1 + c) + (a1 * b2 + a2 * b1)) + a2 * b2
    return np.where(np.isfinite(exact), exact, a * b + c)


def _halves(a):
    high = (np.ascontiguousarray(a).view(np.uint64) >> np.uint64(27) << np.uint64(27)).view(np.float64)
    return high.astype(np.longdouble), (a - high).astype(np.longdouble)


@elementwise("copysign")
def _copysign(a, b):
    return np.copysign(b, a)


@entry(TABLE, "mul", "rn ftz lo hi wide")
def _mul(machine, instruction):
    kind, (into, *operands) = instruction.modifiers[-1], instruction.operands
    a, b = (machine.value(operand, kind) for operand in operands)
    if is_float(kind):
        a, b = flushed(instruction, a), flushed(instruction, b)
        product = rounded(widened(kind)(a) * widened(kind)(b), kind)
        machine.put(into, flushed(instruction, product), kind)
    else:
        machine.put(into, *_integer_product(a, b, kind, instruction.modifiers))


@entry(TABLE, "mad", "lo hi wide")
def _mad(machine, instruction):
    kind, (into, *factors, addend) = instruction.modifiers[-1], instruction.operands
    a, b = (machine.value(operand, kind) for operand in factors)
    product, kind = _integer_product(a, b, kind, instruction.modifiers)
    machine.put(into, product + machine.value(addend, kind), kind)


def _integer_product(a, b, kind, modifiers):
    """The product's part that is asked for, and its type."""
    if "lo" in modifiers:
        return a * b, kind
    bits = number_bits(kind)
    if bits == 64:
        raise PtxError("the high half of a product of 64 bits is not known")
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * bits]
    product = a.astype(wide) * b.astype(wide)
    if "wide" in modifiers:
        return product, f"{kind[0]}{2 * bits}"
    return product >> wide(bits), kind


@entry(TABLE, "shl shr")
def _shift(machine, instruction):
    kind, (into, value, by) = instruction.modifiers[-1], instruction.operands
    a, by = machine.value(value, kind), machine.value(by, "u32")
    limit = number_bits(kind)
    inside = np.minimum(by, limit - 1).astype(a.dtype)
    if instruction.name == "shl":
        shifted, beyond = a << inside, a.dtype.type(0)
    else:
        shifted = a >> inside
        beyond = np.where(a < 0, a.dtype.type(-1), a.dtype.type(0)) if kind[0] == "s" else a.dtype.type(0)
    machine.put(into, np.where(by >= limit, beyond, shifted), kind)


@entry(TABLE, "bfe")
def _extract(machine, instruction):
    """Bits of a number, from a place on, so many."""
    kind, (into, value, start, length) = instruction.modifiers[-1], instruction.operands
    bits = number_bits(kind)
    wide = UNSIGNED[bits]
    a, start, length = (machine.value(operand, f"u{n}") for operand, n in ((value, bits), (start, 32), (length, 32)))
    mask = (wide(1) << length.astype(wide)) - wide(1)
    field = a >> start.astype(wide) & mask
    if kind[0] == "s":
        negative = field >> (length - np.uint32(1)).astype(wide) & wide(1)
        field = np.where(negative == 1, field | ~mask, field)
    machine.put(into, field, f"u{bits}")


@entry(TABLE, "bfi")
def _insert(machine, instruction):
    """Bits of one number in the place of bits of another."""
    kind, (into, field, value, start, length) = instruction.modifiers[-1], instruction.operands
    wide = UNSIGNED[number_bits(kind)]
    a, b = machine.value(field, kind), machine.value(value, kind)
    start, length = (machine.value(operand, "u32").astype(wide) for operand in (start, length))
    mask = ((wide(1) << length) - wide(1)) << start
    machine.put(into, b & ~mask | a << start & mask, kind)


@entry(TABLE, "shf", "l r wrap")
def _funnel(machine, instruction):
    """32 of the 64 bits of two numbers."""
    into, low, high, by = instruction.operands
    low, high, by = (machine.value(operand, "u32").astype(np.uint64) for operand in (low, high, by))
    both, by = high << np.uint64(32) | low, by & np.uint64(31)
    shifted = both << by >> np.uint64(32) if "l" in instruction.modifiers else both >> by
    machine.put(into, shifted.astype(np.uint32), "u32")


@entry(TABLE, "prmt")
def _permute(machine, instruction):
    """Four of eight bytes, or their signs."""
    into, *operands = instruction.operands
    low, high, choice = (machine.spread(operand, "b32") for operand in operands)
    eight = np.stack([low, high], 1).view(np.uint8)
    chosen = choice[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    four = np.take_along_axis(eight, (chosen & 7).astype(np.int64), 1)
    four = np.where(chosen & 8, np.where(four & 128, 255, 0), four).astype(np.uint8)
    machine.put(into, four.view(np.uint32)[:, 0], "b32")


@entry(TABLE, "lop3")
def _logic(machine, instruction):
    """Any function of three bits: the last operand says for which of their eight values it is 1."""
    into, *operands, ones = instruction.operands
    a, b, c = (machine.value(operand, "b32") for operand in operands)
    found = np.zeros((), np.uint32)
    for case in range(8):
        if ones.value >> case & 1:
            found = found | (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    machine.put(into, found, "b32")


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
"""True where an operand is NaN; all others but `ne` of integers are false there."""

COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@entry(TABLE, "setp", " ".join([*COMPARISONS, *UNORDERED, *COMBINED, "num", "nan", "ftz"]))
def _compare(machine, instruction):
    comparison, *more = instruction.modifiers
    kind, (into, a, b, *other) = more[-1], instruction.operands
    if isinstance(into, tuple):
        raise PtxError("the opposite of a comparison is not known")
    result = _compared(comparison, machine.value(a, kind), machine.value(b, kind))
    for name in COMBINED.keys() & set(more):
        result = COMBINED[name](result, machine.value(other[0], "pred"))
    machine.put(into, result, "pred")


def _compared(comparison, a, b):
    nan = (a != a) | (b != b)
    if comparison in ("num", "nan"):
        return nan == (comparison == "nan")
    if comparison in UNORDERED:
        return COMPARISONS[UNORDERED[comparison]](a, b) | nan
    return COMPARISONS[comparison](a, b) & ~nan


@entry(TABLE, "selp")
def _select(machine, instruction):
    kind, (into, a, b, condition) = instruction.modifiers[-1], instruction.operands
    chosen = np.where(machine.value(condition, "pred"), machine.value(a, kind), machine.value(b, kind))
    machine.put(into, chosen, kind)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@entry(TABLE, "cvt", " ".join(["rn", "ftz", *ROUNDINGS]))
def _convert(machine, instruction):
    (into, *operands), (*how, target, source) = instruction.operands, instruction.modifiers
    if target in PACKED:
        low, high = (machine.value(operand, source) for operand in reversed(operands))
        machine.put(into, np.stack(np.broadcast_arrays(low, high), -1), target)
        return
    values = machine.value(operands[0], source)
    rounding = next((ROUNDINGS[name] for name in how if name in ROUNDINGS), None)
    if rounding is not None:
        values = rounding(values)
        if not is_float(target):
            values = _saturated(values, target)
    machine.put(into, flushed(instruction, rounded(values, target)), target)


def _saturated(values, target):
    """The nearest number that an integer of the type can be; 0 for NaN."""
    integer = np.dtype((SIGNED if target[0] == "s" else UNSIGNED)[number_bits(target)])
    limits = np.iinfo(integer)
    inside = np.clip(np.where(np.isnan(values), 0, values), limits.min, limits.max)
    return np.where(inside >= 2.0 ** (limits.bits - (target[0] == "s")), limits.max, inside.astype(integer))
