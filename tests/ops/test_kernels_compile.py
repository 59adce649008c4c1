"""Every GPU kernel compiles ahead of time at the tiles in use and keeps to its registers; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdfo_engine.ops import _compiled

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import json, multiprocessing, sys
from benchmarks import kernel_resources as k

def row(i):
    return k.triton_resources(cases[i], architecture)._asdict()

if sys.argv[1] == "triton":
    architecture = int(sys.argv[2])
    cases = [case for case in k.triton_cases() if architecture in case.architectures]
    if sys.argv[3] == "once":
        cases = list({case.kernel: case for case in cases}.values())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        rows = pool.map(row, range(len(cases)), chunksize=1)
else:
    rows = [row._asdict() for row in k.cuda_resources()]
print(json.dumps(rows))
"""


def resources(kind, architecture, cache, how="all"):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, kind, str(architecture), how]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


GELU = ("triton gelu", "triton lora_linear")  # a fast exponential is as good there as the numbers that it is taken of


def assert_in_registers(rows):
    for row in rows:
        assert row["stack"] == row["spills"] == 0, row
        assert row["approximate"] == 0 or row["kernel"].startswith(GELU), f"only {GELU} may approximate: {row}"
        assert 0 < row["registers"] < 255, row


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("architecture", "how"), [(90, "once"), *(pytest.param(sm, "all", marks=SLOW) for sm in (80, 90, 100))]
)
def test_triton_kernels(architecture, how, tmp_path):
    rows = resources("triton", architecture, tmp_path, how)
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"philox", "tuples"}
    kernels = {row["kernel"].removeprefix("triton ") for row in rows}
    found = {file for file in files if any(f"{name}_".startswith(f"{file}_") for name in kernels)}
    assert found == files, f"without a case in benchmarks/kernel_resources.py: {sorted(files - found)}"
    assert_in_registers(rows)


@pytest.mark.skipif(
    _compiled.WITHOUT_CUDA in _compiled.refusals("cuda", torch.device("cuda")), reason="built without nvcc"
)
def test_cuda_kernels(tmp_path):
    rows = resources("cuda", 0, tmp_path)
    built = {row["architecture"].removesuffix("a") for row in rows}  # an older cuobjdump leaves out the a of sm_90a
    assert built == {"sm_80", "sm_90", "sm_100"}
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} - {"device"}
    kernels = {row["kernel"].split("<")[0].removeprefix("cuda ") for row in rows}
    assert {name.removesuffix("_forward").removesuffix("_backward") for name in kernels} == sources
    assert_in_registers(rows)
