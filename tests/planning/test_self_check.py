import pytest
import torch
from tiny_flux import build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image
from tiny_sd3 import tiny_config

from fdfo_engine import Engine
from fdfo_engine.models.registry import load_model
from fdfo_engine.ops import backends, implementations
from fdfo_engine.planning import self_check
from fdfo_engine.planning.self_check import check_ops, compare
from fdfo_engine.runtime.errors import NumericsError

needs_cpp = pytest.mark.skipif(bool(backends(torch.device("cpu"))["cpp"]), reason="the extension is not built")


def test_rounding_passes_and_a_wrong_value_does_not():
    reference = torch.linspace(-2.0, 2.0, 60).view(3, 20)
    for dtype, rounding in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        compare("op", "cpp", [(reference * (1 + rounding)).to(dtype)], [reference.to(dtype)])
    wrong = reference.clone()
    wrong[1] += 1.0
    told = r"op 64: the backend cpp .* max error 1, at shape \[3, 20\], torch.float32 \(fdfo-engine"
    with pytest.raises(NumericsError, match=told):
        compare("op 64", "cpp", [wrong], [reference])
    with pytest.raises(NumericsError):
        compare("op", "cpp", [torch.full((4,), torch.nan)], [torch.zeros(4)])
    compare("op", "cpp", [torch.full((4,), 1e-6)], [torch.zeros(4)])  # of nothing, rounding is all


@needs_cpp
def test_what_a_run_takes_is_right_here(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run")
    check_ops(load_model(config, torch.device("cpu")), None, "cpp")


@needs_cpp
@pytest.mark.parametrize("op", ["paired_step", "fdfo_loss"])
def test_a_wrong_pair_op_ends_the_start(tiny_sd3, tmp_path, monkeypatch, op):
    right = getattr(self_check, op)

    def perturbed(*arguments, backend, **settings):
        found = right(*arguments, backend=backend, **settings)
        if backend == "torch":
            return found
        return (2 * found[0], found[1]) if op == "fdfo_loss" else found.roll(1, -1)

    monkeypatch.setattr(self_check, op, perturbed)
    with pytest.raises(NumericsError, match=f"{op}: the backend cpp gives something else than plain torch") as caught:
        Engine(tiny_config(tiny_sd3, tmp_path / "run"))
    assert caught.value.exit_code == 6


@needs_cpp
def test_a_wrong_op_of_a_block_ends_the_start(tiny_sd3, tmp_path, monkeypatch):
    """The last op that a forward asks about; every one before it is right."""
    results, asked = self_check._results, []
    monkeypatch.setattr(self_check, "_results", lambda call, backend: asked.append(call.op) or results(call, backend))
    model = load_model(tiny_config(tiny_sd3, tmp_path / "run"), torch.device("cpu"))
    check_ops(model, None, "cpp")
    assert len(set(asked)) >= 3
    last = asked[-1]

    def perturbed(call, backend):
        wrong = (call.op, backend) == (last, "cpp")
        return [tensor + float(wrong) for tensor in results(call, backend)]

    monkeypatch.setattr(self_check, "_results", perturbed)
    with pytest.raises(NumericsError, match=f"{last} .*: the backend cpp gives something else"):
        check_ops(model, None, "cpp")


@needs_cpp
@pytest.mark.parametrize("build", [build_tiny_flux, pytest.param(build_tiny_qwen_image, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_it_looks_at_the_ops_of_every_family_and_dtype(tmp_path, monkeypatch, build, dtype):
    results, asked = self_check._results, set()
    monkeypatch.setattr(self_check, "_results", lambda call, backend: asked.add(call.op) or results(call, backend))
    config = tiny_config(build(tmp_path / "model"), tmp_path / "run", model={"dtype": dtype})
    check_ops(load_model(config, torch.device("cpu")), None, "cpp")
    assert asked >= {"adapted_projections", "gated_residual_norms"}


class Forced:
    """Takes one backend wherever an op has it."""

    def __init__(self, wanted):
        self.wanted = wanted

    def backend(self, call):
        return self.wanted if self.wanted in implementations().get(call.op, ()) else None


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["triton", "triton_ends"])
def test_the_kernels_of_a_gpu_are_right_in_their_interpreter(tiny_sd3, tmp_path, wanted):
    if backends(torch.device("cpu"))["triton"]:
        pytest.skip("Triton's interpreter is off")
    model = load_model(tiny_config(tiny_sd3, tmp_path / "run"), torch.device("cpu"))
    check_ops(model, Forced(wanted), "triton")
