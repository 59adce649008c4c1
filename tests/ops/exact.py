"""METHOD's formulas once more, in float64 numpy and Python ints: shares no code with the ops it checks."""

import numpy as np
import torch
from numerics import assert_as_good_as

LOW = 2**32 - 1


def check(actual, exact, name):
    """The torch reference: within 1e-6 of the largest exact value in float32, as good as plain rounding in others."""
    exact = torch.as_tensor(exact)
    rounded = exact if actual.dtype == torch.float32 else exact.to(actual.dtype)
    assert actual.shape == exact.shape, f"{name}: {actual.shape} is not {exact.shape}"
    assert_as_good_as(actual.cpu(), rounded, exact, name=name)


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(np.asarray(values)).to(device, dtype)


def wide(tensor):
    return tensor.detach().cpu().double().numpy()


def words(counter, key):
    """Philox4x32-10, one counter."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & LOW, (p >> 32) ^ c[3] ^ k[1], p & LOW]
        k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
    return tuple(c)


def noise(shape, *, seed, pair, stream):
    """Normals of one pair and stream."""
    count = int(np.prod(shape))
    out = []
    for j in range((count + 3) // 4):
        w = words((j, stream, pair % 2**32, pair // 2**32), (seed % 2**32, seed // 2**32))
        u = [(x // 512 + 0.5) / 2**23 for x in w]
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            out += [np.sqrt(-2 * np.log(a)) * f(2 * np.pi * b) for f in (np.cos, np.sin)]
    return np.array(out[:count]).reshape(shape)


def prior(shape, *, seed, pair, branch, gamma):
    n, eps = (noise(shape, seed=seed, pair=pair, stream=s) for s in (0, 1 + branch))
    return (n + np.sqrt((1 + gamma) ** 2 - 1) * eps) / (1 + gamma)


def step(x, v, *, t, s, gamma, eps):
    r = s / (1 + gamma - gamma * s)
    overshot = x + (r - t) * v
    return overshot / (1 + gamma * r) + r * np.sqrt((1 + gamma) ** 2 - 1) / (1 + gamma * r) * eps


def direction(x):
    d = (x[:, 0] - x[:, 1]) / 2
    return d / ((d**2).mean(axis=tuple(range(1, d.ndim)), keepdims=True) + 1e-6)


def loss(v, v_old, u, A, clip, total):
    """Loss, log-ratio and dL/dv; `u` signed, one a row. The log-ratio by the distances to the target velocity."""
    axes, n = tuple(range(1, v.ndim)), v[0].size
    log_ratio = (u**2).mean(axes) - ((v - (v_old - u)) ** 2).mean(axes)
    rho = np.exp(log_ratio)
    value = (-A * rho + abs(A) / (2 * clip) * (rho - 1) ** 2).sum() / total
    factor = (-A * rho + abs(A) / clip * (rho - 1) * rho) * (-2 / n) / total
    return value, log_ratio, factor.reshape(-1, *[1] * len(axes)) * (v - v_old + u)


def modulated_norm(x, scale, shift, eps=1e-6):
    """Of each token; torch float64, so that autograd gives the exact gradients."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + scale[:, None]) + shift[:, None]
