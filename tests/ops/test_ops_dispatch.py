import pytest
import torch

from fdfo_engine import ops
from fdfo_engine.ops import _dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_backends_says_why_each_one_cannot_run():
    reasons = ops.backends()
    assert set(reasons) == {"torch", "cpp", "triton", "cuda"}
    assert reasons["torch"] == []
    assert "not built" in reasons["cpp"][0]
    assert "not built" in reasons["cuda"][0]


def test_triton_off_a_gpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.refusals("triton", CPU) == []
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in _dispatch.refusals("triton", CPU)[0]


def test_triton_says_that_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton is not installed" in _dispatch.refusals("triton", CPU)


def test_triton_refuses_an_old_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "below 8.0" in _dispatch.refusals("triton", CUDA)[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _dispatch.choose("op", ("triton", "torch"), CUDA) == "triton"


def test_the_interpreter_is_never_picked_unforced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.choose("op", ("triton", "torch"), CPU) == "torch"
    assert _dispatch.choose("op", ("triton", "torch"), CPU, forced="triton") == "triton"


def test_falls_back_to_torch_where_nothing_faster_fits():
    assert _dispatch.choose("op", ("cuda", "cpp", "triton", "torch"), CPU) == "torch"


@pytest.mark.parametrize(
    ("offered", "device", "forced", "message"),
    [
        (("torch",), CPU, "triton", "op: backend is 'triton': this op has no such implementation"),
        (("torch",), CPU, "fast", "no such backend"),
        (("cpp", "torch"), CPU, "cpp", "cpp: not built"),
        (("cuda", "torch"), torch.device("meta"), None, "cuda: not built.*torch: float64"),
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
