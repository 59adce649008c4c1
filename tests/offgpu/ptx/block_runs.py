"""Each op of a transformer block on small inputs, by backend triton: values and gradients in a list.

Sizes are past a warp and no multiples of a tile, so that masks, barriers and loops matter.
"""

import torch
from ops.exact import draw
from ops.test_projections_to_heads import make, project

from fdfo_engine import ops
from fdfo_engine.ops import Adapter, Gelu, HeadNorm, IntoResidual, Packed, Projection

BATCH, WIDTH, HEAD = 2, 80, 16
TOKENS = (70, 5)
BACKEND = "triton"


def leaf(*shape, seed, dtype=torch.bfloat16, scale=1.0):
    return (scale * draw(*shape, seed=seed)).to(dtype).requires_grad_()


def with_gradients(outputs, leaves):
    """Outputs, and their gradients by each leaf."""
    upstream = [draw(*out.shape, seed=70 + i, dtype=out.dtype) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def gated_residual():
    x, y, gate = leaf(BATCH, 40, 130, seed=0), leaf(BATCH, 40, 130, seed=1), leaf(BATCH, 130, seed=2)
    return with_gradients([ops.gated_residual(x, y, gate, backend=BACKEND)], [x, y, gate])


def gated_residual_norm():
    tokens = [leaf(BATCH, 40, 300, seed=seed) for seed in range(2)]
    rows = [leaf(BATCH, 300, seed=seed) for seed in range(2, 7)]
    second = dict(zip(("scale2", "shift2"), rows[3:], strict=True))
    return with_gradients(ops.gated_residual_norm(*tokens, *rows[:3], **second, backend=BACKEND), [*tokens, *rows])


def qk_rms_norm():
    streams = []
    for count in TOKENS:
        x = [leaf(BATCH, count, WIDTH, seed=5 * count + n) for n in range(3)]
        streams.append(ops.QKV(*x, *(leaf(HEAD, seed=n) for n in (3, 4))))
    rotary = tuple(draw(sum(TOKENS), HEAD, seed=seed) for seed in (90, 91))
    outputs = ops.qk_rms_norm(streams, head_size=HEAD, rotary=rotary, backend=BACKEND)
    return with_gradients(outputs, [t for stream in streams for t in stream])


def linear(inner, outer, seed, end=None):
    """A projection from `inner` to `outer` columns with an adapter, and what of it trains."""
    a, b = leaf(4, inner, seed=seed, dtype=torch.float32), leaf(outer, 4, seed=seed + 1, dtype=torch.float32)
    weight = leaf(outer, inner, seed=seed + 2, scale=inner**-0.5).detach()
    return Projection(weight, leaf(outer, seed=seed + 3).detach(), Adapter(a, b, 0.75), end), [a, b]


def adapted_projection():
    """One layer with GELU."""
    x = leaf(BATCH, 70, WIDTH, seed=0)
    projection, factors = linear(WIDTH, 136, 10, Gelu())
    return with_gradients([ops.adapted_projection(x, projection, backend=BACKEND)], [x, *factors])


def heads():
    """As `projections_to_heads`, forward only: the test of that op compiles the same kernels."""
    return project(*make((65, 3), 3, 64, dtype=torch.bfloat16), head_size=64, backend=BACKEND)


def projections_to_heads():
    """Queries, keys and values of two streams, with their norms."""
    streams, leaves = [], []
    x = [leaf(BATCH, count, 40, seed=count) for count in TOKENS]
    for i in range(len(TOKENS)):
        weights = [leaf(HEAD, seed=n, scale=0.1).detach() + 1 for n in (1, 2)]
        ends = [*(HeadNorm(weight, HEAD, 1e-6, invertible=True) for weight in weights), Packed()]
        layers = [linear(40, 48, 10 * i + n, end) for n, end in enumerate(ends)]
        streams.append([projection for projection, _ in layers])
        leaves += [factor for _, factors in layers for factor in factors]
    return with_gradients(ops.adapted_projections(x, streams, backend=BACKEND).packed, [*x, *leaves])


def projections_into_residuals():
    x, leaves, streams = leaf(BATCH, sum(TOKENS), WIDTH, seed=0), [], []
    for i, count in enumerate(TOKENS):
        residual, gate = leaf(BATCH, count, 40, seed=count), leaf(BATCH, 40, seed=count + 1).detach()
        projection, factors = linear(WIDTH, 40, 10 * i, IntoResidual(residual, gate))
        streams.append([projection])
        leaves += [residual, *factors]
    found = ops.adapted_projections(x, streams, tokens=TOKENS, backend=BACKEND).residuals
    return with_gradients([residual.joined(backend=BACKEND) for residual in found], [x, *leaves])


def feed_forward():
    """Without adapters: GELU as a pass of its own."""
    x, w1, b1 = leaf(BATCH, 40, 24, seed=0), leaf(96, 24, seed=1), leaf(96, seed=2)
    w2, b2 = leaf(24, 96, seed=3), leaf(24, seed=4)
    leaves = [x, w1, b1, w2, b2]
    return with_gradients([ops.feed_forward(*leaves, backend=BACKEND)], leaves)
