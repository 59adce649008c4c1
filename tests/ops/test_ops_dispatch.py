import ast
import importlib.metadata
from pathlib import Path

import pytest
import torch

from fdfo_engine import ops
from fdfo_engine.ops import _compiled, _dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def not_built(monkeypatch):
    """As where no compiler was at hand."""
    monkeypatch.setattr(_compiled, "extension", lambda: None)


def test_backends_says_why_each_one_cannot_run():
    reasons = ops.backends()
    assert set(reasons) == {"torch", "cpp", "triton", "cuda"}
    assert reasons["torch"] == reasons["cpp"] == []
    if not torch.cuda.is_available():
        assert reasons["cuda"][0] in ("torch sees no CUDA device", _compiled.WITHOUT_CUDA)


def test_backends_of_a_device_says_why_each_one_cannot_take_its_tensors():
    meta = ops.backends(torch.device("meta"))
    assert set(meta) == {"torch", "cpp", "triton", "cuda"}
    assert meta["cpp"] == ["it takes tensors on the CPU; got meta"]
    assert "float64" in meta["torch"][0]
    assert ops.backends(CPU)["cpp"] == ops.backends(CPU)["torch"] == []


def test_every_function_that_takes_a_backend_is_asked_for_its_implementations():
    written = set()
    for path in Path(ops.__file__).parent.glob("[!_]*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        functions = [function for function in functions if not function.name.startswith("_")]
        written |= {f.name for f in functions if "backend" in {argument.arg for argument in f.args.kwonlyargs}}
    assert set(ops.implementations()) == written
    for name, offered in ops.implementations().items():
        assert ops.chosen_backend(name, CPU) == ("cpp" if "cpp" in offered else "torch")


def test_a_missing_extension_is_said_and_torch_runs(not_built):
    reasons = ops.backends()
    assert "not built" in reasons["cpp"][0]
    assert "not built" in reasons["cuda"][0]
    assert _dispatch.choose("op", ("cuda", "cpp", "triton", "torch"), CPU) == "torch"
    with pytest.raises(ops.BackendUnavailableError, match=r"philox_normal: .*cpp: not built"):
        ops.philox_normal((4,), seed=0, pair_ids=[0], stream=0, device="cpu", backend="cpp")


@pytest.mark.parametrize(
    ("triton", "numpy", "fits"),
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True), ("3.10.0", "2.10.0", True)],
)
def test_an_interpreter_that_fails_with_this_numpy_is_a_reason(triton, numpy, fits, monkeypatch):
    """Triton 3.6 calls `int` of an array with one axis, which numpy 2.4 made an error."""
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setenv(_dispatch.INTERPRETER, "1")
    _dispatch._interpreter_refusals.cache_clear()
    reasons = _dispatch.refusals("triton", CPU)
    _dispatch._interpreter_refusals.cache_clear()
    assert (reasons == []) == fits
    assert fits or "numpy 2.4.6" in reasons[0]


def test_a_kernel_that_the_extension_lacks_is_named_with_the_way_out():
    with pytest.raises(AssertionError, match="has no NewOp: if csrc/ has it, run `make build`"):
        _compiled.arguments("NewOp", x=0)
    with pytest.raises(AssertionError, match="has no new_op: "):
        _compiled.call("new_op", CPU, None)


class WithCuda:
    """An extension as nvcc makes it, on a machine whose driver it accepts."""

    CUDA_ARCHITECTURES = "80 90a 100"

    class cuda:  # noqa: N801
        @staticmethod
        def probe():
            return None


def test_a_driver_too_old_for_the_extension_is_said(monkeypatch):
    monkeypatch.setattr(WithCuda.cuda, "probe", lambda: "CUDA driver version is insufficient")
    monkeypatch.setattr(_compiled, "extension", WithCuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _dispatch.refusals("cuda", CUDA) == ["the CUDA runtime built in says: CUDA driver version is insufficient"]


def test_an_extension_that_does_not_load_says_why(monkeypatch):
    def broken():
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(_compiled, "extension", broken)
    assert _dispatch.refusals("cpp", CPU) == ["does not load: libgomp.so.1: cannot open shared object file"]


def test_an_extension_without_cuda_says_so(monkeypatch):
    class OnlyCpu:
        CUDA_ARCHITECTURES = ""

    monkeypatch.setattr(_compiled, "extension", OnlyCpu)
    assert _dispatch.refusals("cuda", CUDA) == [_compiled.WITHOUT_CUDA]
    assert _dispatch.refusals("cpp", CPU) == []


def test_compiled_code_refuses_the_other_device():
    assert _dispatch.refusals("cpp", CUDA) == ["it takes tensors on the CPU; got cuda"]


def test_triton_off_a_gpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.refusals("triton", CPU) == []
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in _dispatch.refusals("triton", CPU)[0]


def test_triton_says_that_it_is_missing(monkeypatch):
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: False)
    assert "triton is not installed" in _dispatch.refusals("triton", CPU)


def test_triton_refuses_an_old_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(_compiled, "extension", WithCuda)
    assert "below 8.0" in _dispatch.refusals("triton", CUDA)[0]
    assert "below 8.0" in _dispatch.refusals("cuda", CUDA)[0]
    assert _dispatch.choose("op", ("triton", "cuda", "torch"), CUDA) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _dispatch.choose("op", ("triton", "torch"), CUDA) == "triton"


def test_the_interpreter_is_never_picked_unforced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.choose("op", ("triton", "torch"), CPU) == "torch"
    assert _dispatch.choose("op", ("triton", "torch"), CPU, forced="triton") == "triton"


def test_the_compiled_backend_runs_on_the_cpu():
    assert _dispatch.choose("op", ("cuda", "cpp", "triton", "torch"), CPU) == "cpp"


@pytest.mark.parametrize(
    ("offered", "device", "forced", "message"),
    [
        (("torch",), CPU, "triton", "op: backend is 'triton': this op has no such implementation"),
        (("torch",), CPU, "fast", "no such backend"),
        (("cpp", "torch"), CUDA, "cpp", "cpp: it takes tensors on the CPU"),
        (("cpp", "torch"), torch.device("meta"), None, "cpp: it takes tensors on the CPU.*torch: float64"),
        (("triton", "torch"), torch.device("meta"), "triton", "triton: it needs a tensor on a CUDA device"),
    ],
)
def test_refuses_with_every_reason(offered, device, forced, message):
    with pytest.raises(ops.BackendUnavailableError, match=message):
        _dispatch.choose("op", offered, device, forced=forced)


def test_cuda_without_a_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"philox_normal: .*triton: torch sees no CUDA.*torch: torch sees no CUDA"):
        ops.philox_normal((4,), seed=0, pair_ids=[0], stream=0, device="cuda")
