"""The CUDA sources as a module that runs on CPU tensors: compiled as C++ over a small `cuda_runtime.h`."""

import hashlib
import importlib
import importlib.util
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pybind11
import torch

from fdfo_engine.ops import _compiled, fdfo_loss

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
ROOT = HERE.parent.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "offgpu"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
PLAIN, CONTRACTED = ("-ffp-contract=off",), ("-O2", "-ffp-contract=fast", "-mfma")
LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?), kThreads, 0, as_stream\(stream\)>>>\((.*?)\);", re.DOTALL)
OWN_REGISTRY = '-DPYBIND11_COMPILER_TYPE="offgpu"'
"""Types of the real extension, which may be loaded in the same process, are registered already under their names."""


def built(name="plain", faults=(), contraction=PLAIN):
    """The module, built under `name`, one a process; `faults` are (file, text, other text), planted in a copy."""
    folder = BUILD / name
    sources = folder / "csrc"
    key = _key(faults, contraction)
    target = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    note = folder / "key"
    if not (note.is_file() and note.read_text() == key):
        _copy(sources, faults)
        _build(sources, folder, target, contraction)
        note.write_text(key)
    spec = importlib.util.spec_from_file_location(f"offgpu_{name}._native", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _key(faults, contraction):
    files = sorted([*CSRC.rglob("*.[hc]*"), *HERE.glob("*"), Path(__file__)])
    return hashlib.sha256(repr([faults, contraction, [path.read_bytes() for path in files]]).encode()).hexdigest()


def _copy(sources, faults):
    """The headers and CUDA sources, with launches as function calls, and the faults."""
    files = [path for path in CSRC.rglob("*") if path.is_file()]
    texts = {path.relative_to(CSRC).as_posix(): path.read_text() for path in files}
    for file, text, other in faults:
        assert texts[file].count(text) >= 1, f"{file} has no {text!r} any more"
        texts[file] = texts[file].replace(text, other, 1)
    for name, text in texts.items():
        path = sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LAUNCH.sub(r"emulated::launch(\2, kThreads, \1, \3);", text))


def _build(sources, folder, target, contraction):
    """The CUDA files of this build; the rest is compiled once for all builds."""
    shared, common = [*FLAGS, f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"], BUILD
    own = [*shared, *_includes(CSRC)]
    binding = ["-O0", OWN_REGISTRY, "-DFDFO_WITH_CUDA", '-DFDFO_CUDA_ARCHITECTURES="emulated"']
    work = {common / "binding.o": [*own, *binding, "-c", CSRC / "binding.cpp"]}
    work |= {common / f"{path.stem}.o": [*own, "-c", path] for path in HERE.glob("*.cpp")}
    for path in (sources / "cuda").glob("*.cu"):
        words = [*shared, *_includes(sources), *contraction, "-x", "c++", "-c", path]
        work[folder / f"{path.stem}.o"] = words
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, work, work.values()))
    _run([COMPILER, "-shared", *work, "-o", target])


def _includes(sources):
    return [f"-I{sources}", f"-I{sources / 'include'}", f"-I{sources / 'cuda'}"]


def _compile(made, words):
    """Unless it is there from the same sources: those of one build change with its faults, the rest with csrc."""
    note, key = made.with_suffix(".key"), _key(words, ()) + made.parent.name
    if made.parent == BUILD and note.is_file() and note.read_text() == key:
        return
    _run([COMPILER, *words, "-o", made])
    note.write_text(key)


def _run(words):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@contextmanager
def as_backend_cuda(module, monkeypatch, order="forwards"):
    """Within this context backend "cuda" takes CPU tensors, and `module` computes them, threads in this order."""
    kept = []

    def call(name, _device, arguments, *more):
        return getattr(module.cuda, name)(arguments, *more, 0)

    def ticket(like):
        kept.append(torch.zeros(1, dtype=torch.int32))  # the call is handed its address alone
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setenv("FDFO_THREAD_ORDER", order)
        patch.setattr(_compiled, "extension", lambda: module)
        patch.setattr(_compiled, "call", call)
        patch.setattr(_compiled, "refusals", lambda backend, device: [])
        patch.setattr(fdfo_loss_module(), "_ticket", ticket)
        yield


def fdfo_loss_module():
    """The module, which the function of its name hides."""
    return importlib.import_module(fdfo_loss.__module__)
