"""Triton's kernels as they are compiled for sm_80 and sm_90 pass their ops' own tests, their PTX executed by numpy.

That shows what the interpreter can't: layouts, matrix products, shuffles, masks, copies and barriers. It doesn't show
what an assembler makes of them, races within a warp, and speed. The tests of `offgpu/ptx/` plant faults.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = {
    "philox_normal": {"philox_normal"},
    "paired_noise": {"paired_noise"},
    "paired_step": {"paired_step"},
    "replay": {"replay"},
    "pair_direction": {"pair_direction"},
    "fdfo_loss": {"fdfo_loss_forward", "fdfo_loss_backward"},
    "gated_residual": {
        "gated_residual_forward", "gated_residual_backward", "layer_norm_modulate_forward",
        "layer_norm_modulate_backward",
    },
    "layer_norm_modulate": {"layer_norm_modulate_forward", "layer_norm_modulate_backward"},
    "qk_rms_norm": {"qk_rms_norm_forward", "qk_rms_norm_backward"},
    "adapted_projection": {
        "lora_linear", "lora_linear_input", "lora_linear_rank_product", "lora_linear_rank_gradient",
        "lora_linear_factors", "lora_linear_sum", "gelu_backward",
    },
    "adapted_projections": {"lora_linear", "lora_linear_input"},
    "projections_into_residuals": {"lora_linear", "lora_linear_rank_gradient"},
    "projections_to_heads": {"lora_linear", "lora_linear_rank_gradient"},
    "feed_forward": {"lora_linear", "gelu_forward", "gelu_backward"},
}  # fmt: skip
"""Kernels that the tests of each op must have launched, `tests/ops/test_NAME.py`."""

SHORT = (
    "fdfo_loss.py::test_value_and_gradient[triton-torch.bfloat16-(1025,)]",
    "gated_residual.py::test_value_and_gradient[triton-(2, 33, 17)-torch.bfloat16-two norms]",
    "qk_rms_norm.py::test_values_and_gradients[triton-tokens2-9-32-torch.bfloat16-rotary]",
    "projections_to_heads.py::test_values[triton-torch.bfloat16-(65, 3)-3-64-(0, 1, 2)]",
)
"""A test of each family beside the pair ops, which have theirs in `offgpu/ptx/`."""


def executed(report, *pytest_arguments, capability=80):
    """Runs tests in a process whose kernels are compiled; the kernels that were launched."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    variables |= {
        "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TRITON_CACHE_DIR": str(ROOT / "build/offgpu/triton"), "FDFO_PTX_REPORT": str(report),
        "FDFO_PTX_CAPABILITY": str(capability),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "offgpu.ptx.plugin", "-p", "no:xdist", *pytest_arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return {name.removesuffix("_kernel") for name in json.loads(report.read_text())}


def kernels():
    """Names of all Triton kernels: functions of kernels/ that a launch names."""
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        names |= {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return {name.removesuffix("_kernel") for name in names if name.endswith("_kernel")}


def test_the_tests_are_to_launch_every_kernel():
    assert set().union(*OPS.values()) == kernels()


def test_compiled_kernels_in_short(tmp_path):
    executed(tmp_path / "report.json", "tests/offgpu/ptx", *(f"tests/ops/test_{test}" for test in SHORT))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_faults_planted_in_compiled_kernels(tmp_path):
    executed(tmp_path / "report.json", "tests/offgpu/ptx", "-m", "slow", "--timeout", "900")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_compiled_kernels_pass_the_tests_of_their_op(op, capability, tmp_path):
    arguments = [f"tests/ops/test_{op}.py", "-k", "triton", "-m", "slow or not slow", "--timeout", "900"]
    missing = OPS[op] - executed(tmp_path / "report.json", *arguments, capability=capability)
    assert not missing, f"not launched: {sorted(missing)}"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("capability", [80, 90])
def test_fused_blocks_of_compiled_kernels(capability, tmp_path):
    """Against diffusers' own; and training rounds as the rollout does, also as compiled for one and the other."""
    chosen = "rounds_as_the_rollout or triton_in_bfloat16"
    arguments = ["tests/models/test_fused_parity.py", "-k", chosen, "-m", "slow or not slow", "--timeout", "900"]
    launched = executed(tmp_path / "report.json", *arguments, capability=capability)
    assert launched >= OPS["adapted_projection"] - {"gelu_backward"} | OPS["gated_residual"] | OPS["qk_rms_norm"]
