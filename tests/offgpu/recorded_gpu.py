"""Runs code on a GPU that is not there: a CUDA build of torch over libraries that compute nothing and write all down.

The stand-ins are `recording_driver/` in the place of the CUDA runtime, the driver, cuBLAS and NCCL. Of other libraries
that torch is linked against there are functions that succeed without doing anything.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from offgpu.emulated_cuda import BUILD, COMPILER, ROOT

HERE = Path(__file__).resolve().parent / "recording_driver"
FOLDER = BUILD / "recording_driver"
VARIABLE = "FDFO_CUDA_TORCH"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
LIMIT_S = 900

NAMES = re.compile(r"(__cuda|cuda|cu[A-Z]|cublas|cudnn|cufft|cupti|curand|cusolver|cusparse|nccl|nvrtc|nvshmem)\w*")
"""Functions of NVIDIA's libraries."""

LIBRARIES = re.compile(r"\[(lib(?:cu|nv|nccl)[^\]]*)\]")
"""The libraries, where `readelf` lists what another needs."""


def torch_folder():
    """Where a CUDA build of torch was installed; there may be none."""
    return Path(os.environ.get(VARIABLE) or ROOT / ".cuda-torch").resolve()


def missing():
    """Why nothing can be run, or nothing."""
    if not (torch_folder() / "torch" / "lib" / "libtorch_cuda.so").is_file():
        return f"no CUDA build of torch in {torch_folder()}: make cuda-torch, or set {VARIABLE} to a folder with one"
    if find_spec("triton") is None:
        return "triton, which brings CUDA's headers, is not installed"
    return ""


def ran(module, case, *arguments):
    """What `case` of `module` gives for `arguments`, in a process of its own; `recording.answer` is its last call."""
    _build()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, (torch_folder(), ROOT, ROOT / "tests"))),
        "LD_LIBRARY_PATH": str(FOLDER), "TRITON_LIBCUDA_PATH": str(FOLDER),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", module, case, json.dumps(arguments)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _build():
    """The one library, under the name of each that torch and Triton load."""
    libraries = sorted((torch_folder() / "torch" / "lib").glob("lib*.so"))
    note, key = FOLDER / "key", _key(libraries)
    if note.is_file() and note.read_text() == key:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    objects = [_compiled(source) for source in HERE.glob("*.cpp")]
    silent = FOLDER / "unmodelled.cpp"
    silent.write_text(_unmodelled(libraries, objects))
    _run([COMPILER, "-shared", *objects, _compiled(silent), "-ldl", "-o", FOLDER / "recorder.so"])
    for name in {"libcuda.so", "libcuda.so.1", *_needed(libraries)}:
        (FOLDER / name).unlink(missing_ok=True)
        (FOLDER / name).symlink_to("recorder.so")
    note.write_text(key)


def _key(libraries):
    files = [path.read_bytes() for path in sorted([*HERE.glob("*"), Path(__file__)])]
    return hashlib.sha256(repr([files, [(str(p), p.stat().st_size) for p in libraries]]).encode()).hexdigest()


def _compiled(source):
    made = FOLDER / f"{source.stem}.o"
    headers = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    _run([COMPILER, *FLAGS, f"-I{HERE}", "-isystem", headers, "-c", source, "-o", made])
    return made


def _unmodelled(libraries, objects):
    """C++ of the functions that torch is linked against and the recorder has no answer of its own to."""
    wanted = _symbols("--undefined-only", libraries) - _symbols("--defined-only", objects)
    lines = [f'ANSWER long {name}() {{ return recorder_unmodelled("{name}"); }}' for name in sorted(wanted)]
    declared = "ANSWER long recorder_unmodelled(const char*);"
    return "\n".join(['#define ANSWER extern "C" __attribute__((visibility("default")))', declared, *lines, ""])


def _symbols(which, files):
    """Names of NVIDIA's functions that these files define, or leave undefined."""
    table = "--extern-only" if files[0].suffix == ".o" else "--dynamic"
    lines = _run(["nm", table, which, "--format=posix", *files]).splitlines()
    names = {line.split()[0].split("@")[0] for line in lines if line and not line.endswith(":")}
    return {name for name in names if NAMES.fullmatch(name)}


def _needed(libraries):
    return LIBRARIES.findall(_run(["readelf", "-d", *libraries]))


def _run(words):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
