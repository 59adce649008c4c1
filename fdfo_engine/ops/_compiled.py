"""The compiled extension: whether it is here, and how tensors are handed to it."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, TypeVar

import torch
from torch import Tensor

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`fdfo::Number` of csrc."""

WITHOUT_CUDA = "built without CUDA: there was no nvcc (FDFO_BUILD_CUDA=require makes that an error)"
Strided = tuple[int, int, int]
T = TypeVar("T", Tensor, Tensor | None)


@functools.cache
def extension() -> Any | None:
    """The extension module, or None where it was not built.

    Raises:
        ImportError: it is there and does not load: a library that it needs is missing.
    """
    try:
        return importlib.import_module("fdfo_engine._native")
    except ModuleNotFoundError as error:
        if error.name != "fdfo_engine._native":
            raise
        return None


def refusals(backend: str, device: torch.device) -> list[str]:
    """Reasons why the compiled `backend`, "cpp" or "cuda", can't take tensors on `device`."""
    try:
        module = extension()
    except ImportError as error:
        return [f"does not load: {error}"]
    if module is None:
        return ["not built: install fdfo-engine with a C++ compiler at hand (pip install -e .)"]
    if backend == "cpp":
        return [] if device.type == "cpu" else [f"it takes tensors on the CPU; got {device}"]
    if not module.CUDA_ARCHITECTURES:
        return [WITHOUT_CUDA]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    if device.type != "cuda":
        return [f"it takes tensors on a CUDA device; got {device}"]
    problem = module.cuda.probe()
    return [f"the CUDA runtime built in says: {problem}"] if problem else []


def call(name: str, device: torch.device, arguments: Any, *more: Any) -> Any:
    """Runs the extension's function `name` where `device` is: on as many threads as torch, or on the current stream."""
    module: Any = extension()
    if device.type == "cpu":
        return _built(module.cpu, name)(arguments, *more, torch.get_num_threads())
    with torch.cuda.device(device):
        return _built(module.cuda, name)(arguments, *more, torch.cuda.current_stream(device).cuda_stream)


def arguments(name: str, **fields: Any) -> Any:
    """The struct `name` of csrc/include/fdfo/arguments.h; it holds addresses, so the tensors must outlive it."""
    return _built(extension(), name)(**fields)


def _built(where: Any, name: str) -> Any:
    """What the extension, or a part of it, has under this name."""
    found = getattr(where, name, None)
    assert found is not None, f"the built extension has no {name}: if csrc/ has it, run `make build`"
    return found


def inner_contiguous(tensor: T, lead: int) -> T:
    """`tensor`, or a copy of it, whose axes after the first `lead` are contiguous; None stays None."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape[lead:]), reversed(tensor.stride()[lead:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def empty_contiguous(like: Tensor) -> Tensor:
    """Room for a contiguous tensor of the shape, dtype and device of `like`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def last_contiguous(tensor: T) -> T:
    """`tensor`, or a copy of it, whose last axis is contiguous; None stays None."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    """Of the first element; null for None."""
    return 0 if tensor is None else tensor.data_ptr()


def strided(tensor: Tensor | None) -> Strided:
    """Address and strides of the first two axes; nulls for None."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def row_strided(tensor: Tensor | None) -> tuple[int, int]:
    """Address and stride of the first axis; nulls for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def latent_size(tensor: Tensor, lead: int) -> int:
    """Elements of one latent, the axes after the first `lead`."""
    return math.prod(tensor.shape[lead:])
