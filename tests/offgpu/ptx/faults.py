"""Faults as edits of a kernel's PTX, and what comes of a run with one."""

import re
from contextlib import contextmanager

import torch
from offgpu.ptx.plugin import DRIVER
from offgpu.ptx.program import PtxError

MULTIPLICATION = re.compile(r"mul\.rn\.f32\s+(%r\d+), (\S+), (\S+);")


@contextmanager
def edited(kernel, edit):
    """Within this context `edit` of its PTX runs in the kernel's place."""
    DRIVER.edit = lambda name, text: edit(text) if name == kernel else text
    try:
        yield
    finally:
        DRIVER.edit = lambda name, text: text


def outcome(run, kernel, edit):
    """What the executor says of a run with this fault; else whether the results are the same to the bit."""
    right = run()
    assert edit(DRIVER.texts[kernel]) != DRIVER.texts[kernel], "the fault changes nothing in the text"
    with edited(kernel, edit):
        try:
            wrong = run()
        except PtxError as error:
            return str(error)
    return "the same" if all(map(torch.equal, right, wrong)) else "other results"


def replaced(pattern, by, nth=0):
    """An edit of the nth place of a pattern."""

    def edit(text):
        match = list(re.finditer(pattern, text))[nth]
        return text[: match.start()] + match.expand(by) + text[match.end() :]

    return edit


def everywhere(pattern, by=""):
    """An edit of all places of a pattern."""
    return lambda text: re.sub(pattern, by, text)


def without_barrier(nth):
    return replaced(r"bar\.sync\s+0;", "", nth)


def moved(instruction, by, nth=0):
    """The address of the nth load or store of a kind, some bytes on."""

    def edit(text):
        match = list(re.finditer(rf"({instruction}[^;\[]*\[\s*%\w+)\s*(?:\+\s*(\d+)\s*)?\]", text))[nth]
        return f"{text[: match.start()]}{match[1]}+{int(match[2] or 0) + by}]{text[match.end() :]}"

    return edit


def contracted(text):
    """Every multiplication whose product is added becomes one instruction with the addition, rounded once."""
    for product, a, b in MULTIPLICATION.findall(text):
        addition = rf"add\.rn\.f32\s+(%r\d+), (?:{product}, (\S+)|(\S+), {product});"
        text = re.sub(addition, lambda m, a=a, b=b: f"fma.rn.f32 {m[1]}, {a}, {b}, {m[2] or m[3]};", text)
    return text
