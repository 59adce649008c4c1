"""Rows more than 2^31 elements apart, as in a tensor of that size: an address kept in 32 bits would miss them.

On the CPU the pages in between are never touched, so it costs no memory.
"""

import pytest
import torch
from ops.exact import draw

from fdfo_engine import ops

FAR = 2**31 + 64
LATENT = (3, 50)


@pytest.fixture
def far(device):
    """A copy of a tensor whose first axis has a stride above 2^31 elements."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")

    def far(tensor):
        row = tensor[0].numel()
        room = tensor.new_empty((len(tensor) - 1) * FAR + row)  # torch.empty writes to it in tests
        return room.as_strided(tensor.shape, (FAR, *tensor[0].stride())).copy_(tensor)

    return far


def test_step(far, backend, device):
    x, v = draw(2, 2, *LATENT, device=device), draw(2, 2, *LATENT, seed=1, dtype=torch.bfloat16, device=device)
    where = {"sigma": 0.75, "sigma_next": 0.5, "gamma": 0.1, "seed": 3, "pair_ids": [4, 9], "step": 2}
    expected, used = ops.paired_step(x, v, **where, backend=backend), far(torch.zeros_like(v))
    found = far(x)
    ops.paired_step(found, far(v), **where, v_out=used, inplace=True, backend=backend)
    assert torch.equal(found, expected)
    assert torch.equal(used, v)


def test_replay(far, backend, device):
    velocities = draw(2, 2, 3, *LATENT, dtype=torch.bfloat16, device=device)
    items = {"pair_ids": [4, 9], "pair": [1, 0], "branch": [0, 1], "step": [3, 2]}
    settings = {"sigmas": [1.0, 0.7, 0.3, 0.0], "gammas": 0.1, "seed": 3, "backend": backend}
    expected = ops.replay(velocities, **items, **settings)
    assert torch.equal(ops.replay(far(velocities), **items, **settings), expected)


def test_direction(far, backend, device):
    x = draw(2, 2, *LATENT, device=device)
    assert torch.equal(ops.pair_direction(far(x), backend=backend), ops.pair_direction(x, backend=backend))


def test_loss_and_gradient(far, backend, device):
    v_old, u = draw(2, *LATENT, device=device), draw(2, *LATENT, seed=2, device=device)
    v, A = v_old + 0.01 * draw(2, *LATENT, seed=1, device=device), torch.tensor([0.5, -0.25], device=device)
    found = []
    for lay in (torch.clone, far):
        policy = lay(v.detach()).requires_grad_()
        items = {"pair": [1, 0], "branch": [0, 1]}
        loss, log_ratio = ops.fdfo_loss(policy, lay(v_old), lay(u), A, clip_range=0.1, **items, backend=backend)
        found.append((loss, log_ratio, *torch.autograd.grad(loss, policy)))
    assert all(map(torch.equal, *found))


def test_block_ops(far, backend, device):
    tokens, rows = draw(2, 2, 3, 7, device=device), draw(5, 2, 7, seed=1, device=device)
    found = []
    for lay in (torch.clone, far):
        x, y = (lay(t).requires_grad_() for t in tokens)
        gate, scale, shift, scale2, shift2 = (lay(row).requires_grad_() for row in rows)
        outputs = ops.gated_residual_norm(x, y, gate, scale, shift, scale2=scale2, shift2=shift2, backend=backend)
        outputs += (ops.layer_norm_modulate(x, scale, shift, backend=backend),)
        outputs += (ops.gated_residual(x, y, gate, backend=backend),)
        inputs, upstreams = (x, y, gate, scale, shift, scale2, shift2), [lay(out.detach()) for out in outputs]
        found.append((*outputs, *torch.autograd.grad(outputs, inputs, upstreams)))
    assert all(map(torch.equal, *found))
