"""What pyproject.toml cannot express: folders at the root shipped inside `fdfo_engine`, and the compiled kernels.

`FDFO_BUILD_CUDA` says what to do about the CUDA part: `auto` (default) builds it where nvcc is found, `require` fails
without nvcc, `off` leaves it out. The CPU part needs g++ alone; `FDFO_BUILD_CPP` is `auto` (default), which goes on
without either where there is no g++, or `require`. Neither needs torch.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = {"generic": []}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    INSTRUCTION_SETS["avx512"].append("-mprefer-vector-width=512")
CUDA_ARCHITECTURES = ("80", "90a", "100")
# without contraction of multiply and add, or replay would not repeat sampling bit for bit
CPU_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
CUDA_FLAGS = ["-O3", "-std=c++20", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def wanted(name: str, takes: tuple[str, ...]) -> str:
    """The setting `name` of the environment, `auto` where there is none."""
    value = os.environ.get(name, "auto")
    if value not in takes:
        sys.exit(f"error: {name} = {value!r}: takes {', '.join(takes[:-1])} or {takes[-1]}")
    return value


def has_cxx() -> bool:
    """Whether there is a C++ compiler; says so, or stops, where there is none."""
    wanted("FDFO_BUILD_CPP", ("auto", "require"))
    if shutil.which(cxx()):
        return True
    problem = f"there is no {cxx()} on PATH: install g++, or set CXX"
    for name in ("FDFO_BUILD_CPP", "FDFO_BUILD_CUDA"):
        if os.environ.get(name) == "require":
            sys.exit(f"error: {name} = require, but {problem}; or unset it")
    sys.stderr.write(
        f"\nfdfo_engine: WITHOUT COMPILED KERNELS, everything will run on plain torch, more slowly: {problem}, "
        "and install again\n\n"
    )
    return False


def nvcc() -> str | None:
    """The CUDA compiler to use, or None for a build without CUDA."""
    choice = wanted("FDFO_BUILD_CUDA", ("auto", "require", "off"))
    found = shutil.which("nvcc")
    problem = _problem(found)
    if choice == "require" and problem:
        sys.exit(f"error: FDFO_BUILD_CUDA = require, but {problem}, or unset it")
    if choice == "auto" and problem:
        sys.stderr.write(f"fdfo_engine: without CUDA kernels: {problem}\n")
    return None if problem or choice == "off" else found


def _problem(nvcc_path: str | None) -> str | None:
    """Why the CUDA part can't be built, and what would help."""
    if nvcc_path is None:
        return "there is no nvcc on PATH: install the CUDA toolkit"
    listed = subprocess.run([nvcc_path, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    missing = [a for a in CUDA_ARCHITECTURES if f"compute_{a.rstrip('a')}" not in listed]
    return f"{nvcc_path} can't compile for sm_{missing[0]}: install CUDA 12.8 or newer" if missing else None


class BuildNative(build_ext):
    """Compiles every CPU kernel once an instruction set and every CUDA kernel for all architectures, then links."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Builds `ext`; objects go to the temporary build folder. Without a C++ compiler nothing is built."""
        compiler, folder = nvcc(), Path(self.build_temp) / "native"
        ext.optional = not has_cxx()  # setuptools then does without the file
        if ext.optional:
            return
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (*ext.include_dirs, *self.compiler.include_dirs, CSRC, CSRC / "include")]
        commands = [*self._cpu_commands(includes, folder, compiler), *self._cuda_commands(includes, folder, compiler)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._compile, *zip(*commands, strict=True)))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(made) for _, made in commands]
        linker = [compiler, "-cudart", "static", "-Xcompiler", "-fopenmp"] if compiler else [cxx(), "-fopenmp"]
        self._run([*linker, "-shared", *objects, "-o", str(target)])

    def _cpu_commands(self, includes, folder, compiler):
        cuda = ["-DFDFO_WITH_CUDA", f'-DFDFO_CUDA_ARCHITECTURES="{" ".join(CUDA_ARCHITECTURES)}"'] if compiler else []
        x86 = ["-DFDFO_X86"] if IS_X86 else []
        binding = folder / "binding.o"
        yield [cxx(), *CPU_FLAGS, *x86, *cuda, *includes, "-c", str(CSRC / "binding.cpp"), "-o", str(binding)], binding
        for isa, flags in INSTRUCTION_SETS.items():
            names = [f"-DFDFO_ISA={isa}", f"-DFDFO_TABLE=k{isa.capitalize()}"]
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                made = folder / f"{source.stem}.{isa}.o"
                command = [cxx(), *CPU_FLAGS, *KERNEL_FLAGS, *flags, *names, *includes, "-c", str(source)]
                yield [*command, "-o", str(made)], made

    def _cuda_commands(self, includes, folder, compiler):
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        targets.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
        for source in sorted((CSRC / "cuda").glob("*.cu")) if compiler else ():
            made = folder / f"{source.stem}.cuda.o"
            yield [compiler, *CUDA_FLAGS, *targets, *includes, "-c", str(source), "-o", str(made)], made

    def _compile(self, command: list[str], made: Path) -> None:
        """Runs `command`, unless `made` lies there from the same command and the same files."""
        headers = sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])
        files = [Path(command[command.index("-c") + 1]), *headers]
        key = hashlib.sha256(repr([command, [path.read_bytes() for path in files]]).encode()).hexdigest()
        note = made.with_suffix(".key")
        if note.exists() and note.read_text() == key:
            return
        note.unlink(missing_ok=True)  # what is killed half-way is compiled again
        self._run(command)
        note.write_text(key)

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def cxx() -> str:
    """The C++ compiler."""
    return os.environ.get("CXX", "g++")


# folders at the root, and their names inside the package
ROOT_FOLDERS = {"fdfo_engine.kernels": "kernels", "fdfo_engine.configs": "configs", "fdfo_engine.examples": "examples"}
kernel_packages = ["fdfo_engine.kernels"] + [f"fdfo_engine.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=[
        *find_packages(include=["fdfo_engine", "fdfo_engine.*"]),
        *kernel_packages,
        "fdfo_engine.configs",
        "fdfo_engine.examples",
    ],
    package_dir=ROOT_FOLDERS,
    package_data={
        "fdfo_engine": ["py.typed"],
        "fdfo_engine.shapes": ["base/**/*", "base/*"],
        "fdfo_engine.report": ["*.html"],
        "fdfo_engine.label": ["*.html", "static/*"],
        "fdfo_engine.rollout": ["starter/*.txt"],
        "fdfo_engine.models.known": ["*/*.json", "*/*/*.json"],
        "fdfo_engine.configs": ["*.yaml", "cluster/*"],
        "fdfo_engine.examples": ["*/*.py", "*/*.xml"],
    },
    ext_modules=[
        Pybind11Extension(
            "fdfo_engine._native",
            [str(CSRC / "binding.cpp")],
            depends=sorted(map(str, [*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu*")])),
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
