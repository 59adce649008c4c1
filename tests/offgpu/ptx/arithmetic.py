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
    """Takes 16-bit floats to float64, in which one operation on them is exact enough to be rounded once."""
    half = "f16" in kind
    return (lambda values: values.astype(np.float64)) if half else lambda values: values


def rounded(values, kind):
    """A float result in numpy's type for it; 16-bit ones are rounded as they are written."""
    return values.astype(FLOATS[kind], copy=False) if kind in FLOATS else values


def flushed(instruction, values):
    """Zeros in the place of what is too small, with `.ftz`."""
    if "ftz" not in instruction.modifiers or values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


@elementwise("add", "rn")
def _add(a, b):
    return a + b


@elementwise("sub", "rn")
def _sub(a, b):
    return a - b


@elementwise("neg")
def _neg(a):
    return -a


@elementwise("abs", "ftz")
def _abs(a):
    return np.abs(a)


@elementwise("min")
def _min(a, b):
    return np.fmin(a, b)


@elementwise("max")
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


@elementwise("sqrt", "rn")
def _sqrt(a):
    return np.sqrt(a)


@elementwise("ex2", "approx")
def _ex2(a):
    return np.exp2(a.astype(np.float64))


@elementwise("div", "rn full")
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


@entry(TABLE, "mul", "rn lo hi wide")
def _mul(machine, instruction):
    kind, (into, *operands) = instruction.modifiers[-1], instruction.operands
    a, b = (machine.value(operand, kind) for operand in operands)
    if is_float(kind):
        machine.put(into, rounded(widened(kind)(a) * widened(kind)(b), kind), kind)
    else:
        machine.put(into, *_integer_product(a, b, kind, instruction.modifiers))


@entry(TABLE, "mad", "lo wide")
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


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
"""False where an operand is NaN; with a `u` behind its name it is true there."""


@entry(TABLE, "setp", " ".join([*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num"]))
def _compare(machine, instruction):
    comparison, kind = instruction.modifiers
    into, *operands = instruction.operands
    a, b = (machine.value(operand, kind) for operand in operands)
    nan = (a != a) | (b != b)
    if comparison == "num":
        result = ~nan
    elif comparison[-1] == "u":
        result = COMPARISONS[comparison[:-1]](a, b) | nan
    else:
        result = COMPARISONS[comparison](a, b) & ~nan
    if kind not in PACKED:
        into, result = (into,), result[..., None]
    for predicate, column in zip(into, np.moveaxis(result, -1, 0), strict=True):
        machine.put(predicate, column, "pred")


@entry(TABLE, "selp")
def _select(machine, instruction):
    kind, (into, a, b, condition) = instruction.modifiers[-1], instruction.operands
    chosen = np.where(machine.value(condition, "pred"), machine.value(a, kind), machine.value(b, kind))
    machine.put(into, chosen, kind)


@entry(TABLE, "cvt", "rn")
def _convert(machine, instruction):
    (into, *operands), (*_, target, source) = instruction.operands, instruction.modifiers
    if is_float(source) and not is_float(target):
        raise PtxError("a float as an integer is not known")
    if target in PACKED:
        low, high = (machine.value(operand, source) for operand in reversed(operands))
        machine.put(into, np.stack(np.broadcast_arrays(low, high), -1), target)
        return
    machine.put(into, rounded(machine.value(operands[0], source), target), target)
