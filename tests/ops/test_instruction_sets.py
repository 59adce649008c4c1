"""The compiled CPU code gives the same bits on every instruction set and any number of threads."""

import pytest
import torch
from ops.exact import draw

from fdfo_engine import ops
from fdfo_engine.ops import _compiled, _gelu

CPU = _compiled.extension().cpu
SHAPE = (3, 37, 41)


def results():
    """Every op on odd sizes: several blocks of noise and of sums, and a rest."""
    ids, x, v = [3, 2**33 + 1], draw(2, 2, *SHAPE), draw(2, 2, *SHAPE, seed=1, dtype=torch.bfloat16)
    where = {"seed": 5, "pair_ids": ids, "backend": "cpp"}
    velocities = torch.empty(2, 2, 1, *SHAPE, dtype=torch.bfloat16)
    step = {"sigma": 0.75, "sigma_next": 0.5, "gamma": 0.1, "step": 0, "v_uncond": v.flip(0), "guidance_scale": 3.0}
    yield ops.philox_normal(SHAPE, stream=4, device="cpu", **where)
    yield ops.paired_noise(ids, SHAPE, seed=5, gamma=torch.tensor([0.3, 0.0]), device="cpu", backend="cpp")
    yield ops.paired_step(x, v, v_out=velocities[:, :, 0], **step, **where)
    yield velocities
    items = {"pair": [0, 1, 1], "branch": [1, 0, 0], "step": [1, 0, 1]}
    yield ops.replay(velocities, sigmas=[0.75, 0.5], gammas=0.1, **items, **where)
    yield ops.pair_direction(x, backend="cpp")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        current, old = (draw(2, *SHAPE, seed=s, dtype=dtype) for s in (2, 3))
        current.requires_grad_()
        advantage, u = torch.tensor([0.5, -0.25]), 0.1 * draw(1, *SHAPE)
        loss, log_ratio = ops.fdfo_loss(current, old, u, advantage, clip_range=0.5, backend="cpp")
        h, bias, grad = (draw(*shape, seed=4, dtype=dtype) for shape in ((7, 777), (777,), (7, 777)))
        yield _gelu.forward(3 * h, bias, "cpp", inplace=False)
        yield from _gelu.backward(3 * h, bias, grad, "cpp", inplace=False, activation=True)
        yield from (loss, log_ratio, *(torch.autograd.grad(f * loss, current, retain_graph=True)[0] for f in (1, -2)))
        yield from block_results(dtype)


def block_results(dtype):
    """The ops of a transformer block: two blocks of tokens, and widths with and without a rest."""
    for size in (37, 208):
        tokens = [draw(2, 33, size, seed=s, dtype=dtype).requires_grad_() for s in (4, 5)]
        rows = [draw(2, size, seed=s, dtype=dtype).requires_grad_() for s in (6, 7, 8, 9, 10)]
        gate, scale, shift, scale2, shift2 = rows
        outputs = ops.gated_residual_norm(*tokens, gate, scale, shift, scale2=scale2, shift2=shift2, backend="cpp")
        outputs += (ops.layer_norm_modulate(tokens[0], scale, shift, backend="cpp"),)
        outputs += (ops.gated_residual(*tokens, gate, backend="cpp"),)
        yield from outputs
        yield from torch.autograd.grad(outputs, [*tokens, *rows], [t.detach().flip(1) for t in outputs])


@pytest.fixture
def plain():
    CPU.use_instruction_set("generic")
    yield list(results())
    CPU.use_instruction_set(CPU.instruction_sets()[-1])


def test_the_best_one_is_taken():
    assert CPU.instruction_set() == CPU.instruction_sets()[-1]
    assert CPU.instruction_sets()[0] == "generic"
    with pytest.raises(ValueError, match="this processor has no avx1024"):
        CPU.use_instruction_set("avx1024")


@pytest.mark.parametrize("name", CPU.instruction_sets())
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_are_the_same(plain, name, threads):
    before = torch.get_num_threads()
    CPU.use_instruction_set(name)
    torch.set_num_threads(threads)
    try:
        found = list(results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.isfinite(tensor).all() for tensor in plain)
    for number, (one, other) in enumerate(zip(plain, found, strict=True)):
        assert torch.equal(one, other), number
