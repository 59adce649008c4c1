"""What `setup.py` does about the CUDA part, in a machine with and without nvcc."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def build(tmp_path):
    """Builds the extension into `tmp_path / "out"`, on a PATH of g++ and its tools alone, with one setting."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("g++", "as", "ld"):
        (tools / name).symlink_to(shutil.which(name))

    def build(cuda):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "out")]
        command += ["--build-temp", str(tmp_path / "temp")]
        env = {**os.environ, "PATH": str(tools), "FDFO_BUILD_CUDA": cuda}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)

    return build


def test_require_fails_without_nvcc(build):
    done = build("require")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "error: FDFO_BUILD_CUDA = require, but there is no nvcc on PATH: install the CUDA toolkit, or unset it"
    )


@pytest.mark.parametrize("cuda", ["require", "auto"])
def test_an_nvcc_too_old_is_named(build, tmp_path, cuda, monkeypatch):
    old = tmp_path / "bin/nvcc"
    old.write_text("#!/bin/sh\necho compute_80 compute_90\n")
    old.chmod(0o755)
    if cuda == "auto":  # stops before the compiling: there is no g++ to find either
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
    done = build(cuda)
    assert "nvcc can't compile for sm_100: install CUDA 12.8 or newer" in done.stderr
    assert ("without CUDA kernels" in done.stderr) == (cuda == "auto")


def test_refuses_another_word(build):
    done = build("yes")
    assert done.returncode == 1
    assert "error: FDFO_BUILD_CUDA = 'yes': takes auto, require or off" in done.stderr


@pytest.fixture
def tree(tmp_path):
    """A copy of what the extension is built from, and a compiler that only notes what it is asked for."""
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("fdfo_engine", "configs", "examples", "kernels"):
        (root / name).mkdir()
    (root / "fdfo_engine/__init__.py").write_text('__version__ = "0"')
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\nfor last; do :; done; touch $last\n")
    compiler.chmod(0o755)
    return root


@pytest.mark.slow
def test_only_what_changed_is_compiled_again(tree, tmp_path):
    def compiled():
        (tmp_path / "asked").write_text("")
        environment = {**os.environ, "CXX": str(tmp_path / "compiler"), "FDFO_BUILD_CUDA": "off"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        words = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
        return sorted(Path(w[w.index("-c") + 1]).name for w in words if "-c" in w)

    everything = compiled()
    sets = everything.count("replay.cpp")
    assert len(everything) == 1 + sets * len(list((tree / "csrc/cpu").glob("*.cpp")))
    with (tree / "csrc/cpu/replay.cpp").open("a") as file:
        file.write("// changed")
    assert compiled() == ["replay.cpp"] * sets
    with (tree / "csrc/include/fdfo/philox.h").open("a") as file:
        file.write("// changed")
    assert compiled() == everything


@pytest.mark.slow
def test_auto_without_nvcc_builds_the_cpu_part(build, tmp_path):
    done = build("auto")
    assert done.returncode == 0, done.stderr
    made = next((tmp_path / "out/fdfo_engine").glob("_native*.so"))
    load = f"""
import importlib.util, fdfo_engine.ops._compiled as compiled, torch
spec = importlib.util.spec_from_file_location("_native", {str(made)!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
compiled.extension = lambda: native
print(compiled.refusals("cpp", torch.device("cpu")), compiled.refusals("cuda", torch.device("cuda")))
"""
    found = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == (
        "[] ['built without CUDA: there was no nvcc (FDFO_BUILD_CUDA=require makes that an error)']"
    )


@pytest.fixture
def without_gxx(tmp_path):
    """Builds as `build`, with an empty PATH and another setting."""

    def build(cpp):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-lib", str(tmp_path / "out")]
        command += ["--build-temp", str(tmp_path / "temp")]
        env = {**os.environ, "PATH": str(tmp_path), "FDFO_BUILD_CPP": cpp, "FDFO_BUILD_CUDA": "off"}
        env.pop("CXX", None)
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)

    return build


def test_without_gxx_the_installation_goes_on_and_says_so(without_gxx, tmp_path):
    done = without_gxx("auto")
    assert done.returncode == 0, done.stderr
    assert "WITHOUT COMPILED KERNELS" in done.stderr
    assert "there is no g++ on PATH: install g++, or set CXX" in done.stderr
    assert not list((tmp_path / "out").rglob("*.so"))


def test_required_kernels_stop_without_gxx(without_gxx):
    done = without_gxx("require")
    assert done.returncode == 1
    assert "error: FDFO_BUILD_CPP = require, but there is no g++ on PATH" in done.stderr
    assert "error: FDFO_BUILD_CPP = 'no': takes auto or require" in without_gxx("no").stderr


def test_the_source_distribution_has_what_a_checkout_has(tmp_path):
    """By setuptools' own reading of MANIFEST.in."""
    code = (
        "import setuptools, sys; from setuptools import Distribution\n"
        "from setuptools.command.egg_info import FileList\n"
        "from distutils.text_file import TextFile\n"
        "files = FileList(); template = TextFile('MANIFEST.in', strip_comments=1, skip_blanks=1, join_lines=1)\n"
        "[files.process_template_line(line) for line in template.readlines()]\n"
        "print('\\n'.join(files.files))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    listed = set(done.stdout.split("\n"))
    expected = [
        "docs/QUICKSTART.md", "examples/reward_server.py", "tests/conftest.py", "configs/shapes.yaml", "Makefile",
        "benchmarks/run.py", "tests/tiny_sd3.py", "csrc/binding.cpp", "configs/cluster/slurm.sbatch",
    ]  # fmt: skip
    assert set(expected) <= listed, done.stderr
    assert not [name for name in listed if name.endswith((".so", ".pyc"))]
