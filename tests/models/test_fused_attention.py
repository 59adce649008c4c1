"""Attention by name, against the formula in float64."""

import pytest
import torch
from numerics import assert_as_good_as

from fdfo_engine.models.fused import attention, attention_backends
from fdfo_engine.ops import BackendUnavailableError

DTYPES = (torch.float32, torch.bfloat16)
SHAPE = (2, 37, 3, 16)


def formula(q, k, v):
    weights = torch.einsum("bqhe,bkhe->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhe->bqhe", weights, v)


def run(function, tensors):
    leaves = [t.detach().requires_grad_(True) for t in tensors]
    out = function(*leaves)
    (
        out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out)
    ).sum().backward()
    return out.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_is_the_formula(device, dtype):
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(SHAPE, generator=draw).to(device, dtype) for _ in range(3)]
    exact, plain = run(formula, [t.double() for t in tensors]), run(formula, tensors)
    names = [n for n, reasons in attention_backends(tensors[0].device, dtype, SHAPE[-1]).items() if not reasons]
    assert {"auto", "sdpa"} <= set(names)
    for name in names:
        found = run(lambda *qkv, name=name: attention(*qkv, backend=name), tensors)
        again = run(lambda *qkv, name=name: attention(*qkv, backend=name), tensors)
        for part, a, b, c, d in zip("oqkv", found, plain, exact, again, strict=True):
            assert_as_good_as(a, b, c, name=f"{name} {part}")
            assert torch.equal(a, d) or name not in ("auto", "sdpa")


def test_views_of_packed_tokens(device):
    packed = torch.randn(2, 37, 9, 16, device=device)
    q, k, v = packed.split(3, 2)
    exact = formula(*(t.double() for t in (q, k, v)))
    assert_as_good_as(attention(q, k, v), formula(q, k, v), exact, name="views")


def test_a_forced_one_that_cannot_run_says_why():
    q = torch.randn(1, 4, 2, 16)
    for name in ("cudnn", "flash3", "xformers"):
        with pytest.raises(BackendUnavailableError, match=f"{name} can't run on cpu: it needs a CUDA device"):
            attention(q, q, q, backend=name)
    with pytest.raises(BackendUnavailableError, match="no such attention; there are auto, sdpa"):
        attention(q, q, q, backend="fast")


def test_reasons_on_a_gpu_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    found = attention_backends(torch.device("cuda:7"), torch.float32, 252)
    assert found["auto"] == found["sdpa"] == []
    assert "it takes bfloat16 and float16, not torch.float32" in found["flash"]
    assert "heads are 252 wide; it takes multiples of 8 up to 128" in found["cudnn"]
    assert "cuDNN 91400 is older than 91501 and wrong for some lengths" in found["cudnn"]
    assert any("flash_attn_interface" in reason or "below 9.0" in reason for reason in found["flash3"])


def test_deterministic_mode_leaves_out_what_does_not_repeat(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = attention_backends(torch.device("cuda:6"), torch.bfloat16, 64)
    for name in ("cudnn", "xformers"):
        assert "its backward does not repeat bit for bit, which run.deterministic asks for" in found[name]
