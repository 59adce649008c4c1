"""A pytest plugin, `-p offgpu.ptx.plugin`: backend "triton" takes CPU tensors, and the PTX of its kernels is executed.

It takes a process of its own, without TRITON_INTERPRET. FDFO_PTX_REPORT names a file for the launches of each kernel,
FDFO_PTX_CAPABILITY the GPU to compile for, 80 or 90.
"""

import importlib
import json
import os
from pathlib import Path

from offgpu.ptx.driver import install

from fdfo_engine.ops import _dispatch, _projection_launch, _projection_tiles

assert not _dispatch.interpreted(), "kernels that the interpreter decorated can't be compiled"
DRIVER = install(int(os.environ.get("FDFO_PTX_CAPABILITY", "80")))
"""What runs the kernels, to ask what ran and to plant faults."""

refusals_elsewhere = _dispatch._triton_refusals
_dispatch._triton_refusals = lambda device: [] if device.type == "cpu" else refusals_elsewhere(device)
_projection_launch.tile_of = lambda x, *, more: _projection_tiles.tile(x.dtype, DRIVER.capability // 10, more=more)
for name in ("philox_normal", "paired_noise", "paired_step", "replay"):
    op = importlib.import_module(f"fdfo_engine.ops.{name}")
    op.INTERPRETED_BLOCK = op.BLOCK  # what a GPU takes


def pytest_sessionfinish():
    """Says what ran."""
    if report := os.environ.get("FDFO_PTX_REPORT"):
        Path(report).write_text(json.dumps(DRIVER.executed))
