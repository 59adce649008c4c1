"""PTX text as a list of instructions whose operands are told apart. Of the language: what Triton writes for sm_80."""

import re
from dataclasses import dataclass, field, replace


class PtxError(Exception):
    """What a GPU would get wrong, or the executor doesn't know. The message names the instruction."""


@dataclass(frozen=True)
class Register:
    """A variable of each thread: an unsigned number of `bits`, or 1 of a predicate. `negated` reads it as `!%p1`."""

    name: str
    bits: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A number in the text: its value as an integer, or the bits of a float."""

    value: int


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; without a base it is an offset into the space's own memory."""

    base: Register | None
    offset: int


@dataclass(frozen=True)
class Instruction:
    """`@guard name.modifiers operands`, its `place` in the code, and the line of the source that it was made of.

    The guard is None where there is none. A vector `{a, b}` and a pair `a|b` are tuples of operands.
    """

    guard: Register | None
    name: str
    modifiers: tuple
    operands: tuple
    text: str
    line: tuple | None
    place: int


@dataclass
class Program:
    """One kernel. `parameters` are (offset, bytes) of each, in order; `labels` maps to places in the code."""

    name: str
    parameters: list = field(default_factory=list)
    shared_bytes: int = 0
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)

    @property
    def parameter_bytes(self):
        offset, size = self.parameters[-1]
        return offset + size


SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid", "ntid") for axis in "xyz"} | {"%laneid"}
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{(.*?)\n\}", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+\.(?P<kind>\w+)\s+(?:\.\w+\s+(?:\d+\s+)?)*(?P<name>[\w$]+)$")
SHARED = re.compile(r"(?P<extern>\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+(?P<name>[\w$]+)\[(?P<bytes>\d*)\]")
REGISTERS = re.compile(r"\.reg\s+\.(?P<kind>\w+)\s+(?P<prefix>%?\w+)(?:<\d+>)?;")
STATEMENT = re.compile(r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<words>[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);|[{}])", re.DOTALL)
GUARDED = re.compile(r"@(!?)(%\w+)\s+(.*)")
SOURCE_LINE = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
FILE = re.compile(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", re.MULTILINE)
NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)$")
FLOAT = re.compile(r"0[fFdD][0-9a-fA-F]+$")


def parsed(text):
    """The program of the one kernel in `text`."""
    files = dict(FILE.findall(text))
    text = re.sub(r"//[^\n]*", "", text)
    name, parameters, body = ENTRY.search(text).groups()
    program = Program(name, files=files)
    symbols = _parameters(program, parameters) | _shared(program, text)
    return _read(program, body, _Operands(symbols, _bits_of_registers(body)))


def _parameters(program, text):
    """Lays the parameters out; their names as addresses."""
    symbols, end = {}, 0
    for parameter in filter(None, map(str.strip, text.split(","))):
        kind, name = PARAMETER.match(parameter).group("kind", "name")
        size = int(kind[1:]) // 8
        offset = -(-end // size) * size
        program.parameters.append((offset, size))
        symbols[name], end = offset, offset + size
    return symbols


def _shared(program, text):
    """Names of shared arrays as addresses: what has a size first, then what the launch gives a size."""
    symbols, open_ended = {}, []
    for match in SHARED.finditer(text):
        if match["extern"]:
            open_ended.append(match["name"])
            continue
        symbols[match["name"]] = program.shared_bytes
        program.shared_bytes += -(-int(match["bytes"]) // 1024) * 1024
    return symbols | dict.fromkeys(open_ended, program.shared_bytes)


def _bits_of_registers(body):
    """Width of a register by the letters of its name."""
    return {
        match["prefix"]: 1 if match["kind"] == "pred" else int(match["kind"][1:]) for match in REGISTERS.finditer(body)
    }


def _read(program, body, operands):
    body = re.sub(r"^\s*\.loc[^\n]*", r"\g<0>;", body, flags=re.MULTILINE)
    line, end = None, 0
    while body[end:].strip():
        match = STATEMENT.match(body, end)
        if match is None:
            raise PtxError(f"{program.name}: no statement: {body[end : end + 80]!r}")
        end = match.end()
        words = " ".join((match["words"] or "").split())
        if match["label"]:
            program.labels[match["label"]] = len(program.code)
        elif words.startswith(".loc"):
            line = SOURCE_LINE.match(words).groups()
        elif words and not words.startswith("."):
            program.code.append(_instruction(words, operands, line, len(program.code)))
    return program


def _instruction(words, operands, line, place):
    guard, rest = None, words
    if guarded := GUARDED.match(words):
        negated, name, rest = guarded.groups()
        guard = replace(operands.register(name), negated=bool(negated))
    opcode, _, arguments = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    try:
        given = tuple(map(operands.operand, _split(arguments, ",")))
    except KeyError as error:
        raise PtxError(f"{words}: {error.args[0]!r} is no operand that is known") from None
    return Instruction(guard, name, tuple(modifiers), given, words, line, place)


def _split(text, separator):
    """At the separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text.strip() else []


class _Operands:
    def __init__(self, symbols, bits):
        self.symbols, self.bits = symbols, bits

    def operand(self, text):
        if text[0] == "{":
            return tuple(map(self.operand, _split(text[1:-1], ",")))
        if text[0] == "[":
            return self.address(text[1:-1])
        if "|" in text:
            return tuple(map(self.operand, text.split("|")))
        if text[0] == "!":
            return replace(self.register(text[1:]), negated=True)
        if text[0] == "%" or text == "_" or text in self.bits:
            return self.register(text)
        return self.constant(text)

    def register(self, name):
        if name == "_" or name in SPECIAL:
            return Register(name, 32)
        return Register(name, self.bits.get(name) or self.bits[name.rstrip("0123456789")])

    def address(self, text):
        base, _, offset = map(str.strip, text.partition("+"))
        offset = int(offset or "0", 0)
        return Address(self.register(base), offset) if base[0] == "%" else Address(None, self.symbols[base] + offset)

    def constant(self, text):
        if FLOAT.match(text):
            return Immediate(int(text[2:], 16))
        if NUMBER.match(text):
            return Immediate(int(text, 0))
        if text in self.symbols:
            return Immediate(self.symbols[text])
        return text  # a label
