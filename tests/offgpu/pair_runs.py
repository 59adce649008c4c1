"""Each pair op on small inputs of a shape, by a backend that takes CPU tensors: all it returns in one tensor."""

import torch

from fdfo_engine import ops


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def philox(shape, backend):
    ids = [0, 5, 2**40]
    return ops.philox_normal(shape, seed=9, pair_ids=ids, stream=3, device="cpu", backend=backend)


def noise(shape, backend):
    return ops.paired_noise(torch.tensor([2, 7]), shape, seed=4, gamma=0.3, device="cpu", backend=backend)


def step(shape, backend):
    x = normal(2, 2, *shape)
    found = [
        ops.paired_step(
            x, normal(2, 2, *shape, seed=1, dtype=dtype), sigma=0.75, sigma_next=0.7, gamma=gamma, seed=3,
            pair_ids=[1, 6], step=2, backend=backend, guidance_scale=3.5,
            v_uncond=normal(2, 2, *shape, seed=2, dtype=dtype) if guided else None,
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16) for gamma in (0.0, 0.1) for guided in (False, True)
    ]  # fmt: skip
    return torch.stack(found)


def replay(shape, backend):
    velocities = normal(2, 2, 4, *shape, dtype=torch.bfloat16)
    return ops.replay(
        velocities, pair_ids=[3, 8], pair=torch.tensor([0, 1, 1]), branch=torch.tensor([1, 0, 1]),
        step=torch.tensor([0, 2, 3]), sigmas=torch.linspace(1, 0, 5), gammas=0.2, seed=5, backend=backend,
    )  # fmt: skip


def direction(shape, backend):
    return ops.pair_direction(normal(3, 2, *shape), backend=backend)


def loss(shape, backend):
    rows = 5
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        v_old = normal(rows, *shape, dtype=dtype)
        v = (v_old.float() + 0.05 * normal(rows, *shape, seed=1)).to(dtype).requires_grad_()
        value, log_ratio = ops.fdfo_loss(
            v, v_old, normal(3, *shape, seed=2), torch.linspace(-1, 1, rows), clip_range=0.03,
            pair=torch.tensor([0, 0, 1, 1, 2]), branch=torch.tensor([0, 1, 0, 1, 0]), backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(value, v)
        found.append(torch.cat([value.detach()[None], log_ratio.flatten(), grad.float().flatten()]))
    return torch.stack(found)
