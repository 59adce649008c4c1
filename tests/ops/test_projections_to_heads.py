"""Projections with norms of heads, against float64 and the two ops that they stand for."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_as_good_as, assert_gradients_as_good_as
from ops.exact import draw
from torch.nn import functional

from fdfo_engine import ops
from fdfo_engine.ops import Adapter, HeadNorm, Packed, Projection, _projection_torch, _projection_triton
from fdfo_engine.ops._description import Description
from fdfo_engine.ops.adapted_projections import route

SCALING, EPS = 0.75, 1e-6


def make(tokens=(9, 4), heads=3, size=16, *, K=40, adapted=(0, 1, 2), dtype=torch.float32, weights=None, device="cpu"):
    """x of each stream in a wider tensor, its three layers, and weights of the norms of queries and keys."""
    N, x, linears, norms = heads * size, [], [], []
    for i, count in enumerate(tokens):
        x.append(draw(2, count + 1, K + 8, seed=10 * i, dtype=dtype, device=device)[:, 1:, :K])
        layers = []
        for j in range(3):
            shapes, seed = ((N, K), (N,), (4, K), (N, 4)), 10 * i + 3 * j
            w, b, a, c = (K**-0.5 * draw(*shape, seed=seed + n, device=device) for n, shape in enumerate(shapes))
            layers.append((w.to(dtype), b.to(dtype), *((a, c * K**0.5) if j in adapted else (None, None))))
        linears.append(layers)
        norms.append(tuple((1 + 0.3 * draw(size, seed=i + n, device=device)).to(weights or dtype) for n in (5, 7)))
    return x, linears, norms


def project(x, linears, norms, *, head_size, eps=EPS, invertible=True, backend=None):
    """Queries, keys and values `[B, sum S_i, H, E]`, by the op."""
    projections = []
    for layers, weights in zip(linears, norms, strict=True):
        ends = [*(HeadNorm(weight, head_size, eps, invertible=invertible) for weight in weights), Packed()]
        projections.append(
            [
                Projection(w, b, None if a is None else Adapter(a, c, SCALING), end)
                for (w, b, a, c), end in zip(layers, ends, strict=False)
            ]
        )
    packed = ops.adapted_projections(x, projections, backend=backend).packed
    return [part.unflatten(2, (-1, head_size)) for part in packed]


def formula(x, linears, norms, size, dtype):
    """By torch in `dtype`, every step rounded as diffusers and peft do."""
    packed = []
    for kind in range(3):
        parts = []
        for tokens, layers, weights in zip(x, linears, norms, strict=True):
            w, b, a, c = layers[kind]
            y = functional.linear(tokens.to(dtype), w.to(dtype), b.to(dtype))
            if a is not None:
                y = y + SCALING * (tokens.to(dtype) @ a.to(dtype).T) @ c.to(dtype).T
            y = y.unflatten(2, (-1, size))
            if kind < 2:
                wide = torch.promote_types(dtype, torch.float32)
                n = y.to(wide) * (y.to(wide).square().mean(-1, keepdim=True) + EPS).rsqrt()
                weight = weights[kind].to(torch.float64) if dtype == torch.float64 else weights[kind]
                y = (n.to(weight.dtype) * weight).to(dtype)
            parts.append(y)
        packed.append(torch.cat(parts, 1))
    return packed


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "adapted"),
    [((1,), 1, 16, (0, 1, 2)), ((9, 4), 3, 16, (0, 2)), ((65, 3), 3, 64, (0, 1, 2)), ((5, 2), 5, 32, (1,)),
     ((3, 2), 2, 8, (0, 1, 2)), ((3, 2), 2, 16, ())], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values(tokens, heads, size, adapted, dtype, backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears, norms = make(tokens, heads, size, adapted=adapted, dtype=dtype, device=device)
    given = {"head_size": size, "backend": backend}
    found = project(x, linears, norms, **given)
    exact = formula([t.double() for t in x], linears, norms, size, torch.float64)
    for name, y, plain, true in zip("qkv", found, formula(x, linears, norms, size, dtype), exact, strict=True):
        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, true.shape, True)
        assert_as_good_as(y, plain, true, name=name)
    assert all(map(torch.equal, found, project(x, linears, norms, **given)))


@torch.no_grad()
def test_float32_weights_of_norms(backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears, norms = make(dtype=torch.bfloat16, weights=torch.float32, device=device)
    found = project(x, linears, norms, head_size=16, backend=backend)
    plain = formula(x, linears, norms, 16, torch.bfloat16)
    exact = formula([t.double() for t in x], linears, norms, 16, torch.float64)
    for name, y, own, true in zip("qkv", found, plain, exact, strict=True):
        assert_as_good_as(y, own, true, name=name)


def leaves_of(x, linears):
    """Copies that want gradients, x first, and all of them in a row."""
    x = [t.detach().clone().requires_grad_() for t in x]
    linears = [
        [[None if t is None else t.detach().clone().requires_grad_() for t in layer] for layer in layers]
        for layers in linears
    ]  # fmt: skip
    return x, linears, [*x, *(t for layers in linears for layer in layers for t in layer if t is not None)]


EVERY = (0, 1, 2)


@pytest.mark.parametrize(
    ("tokens", "heads", "size", "adapted", "used"),
    [((1,), 1, 16, EVERY, EVERY), ((9, 4), 3, 16, (0, 2), EVERY), ((5, 2), 3, 16, EVERY, (1,)),
     ((5, 2), 3, 16, (0,), (0, 2)), pytest.param((65, 3), 1, 64, EVERY, EVERY, marks=pytest.mark.slow),
     pytest.param((5, 2), 5, 32, (1,), EVERY, marks=pytest.mark.slow)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(tokens, heads, size, adapted, used, dtype, backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears, norms = make(tokens, heads, size, adapted=adapted, dtype=dtype, device=device)
    upstream = [draw(2, sum(tokens), heads, size, seed=60 + i, dtype=dtype, device=device) for i in range(3)]

    def gradients(run, dtype):
        of = [[[t if t is None else t.to(dtype) for t in n] for n in ls] for ls in linears] if dtype else linears
        own_x, own, leaves = leaves_of([t.to(dtype) if dtype else t for t in x], of)
        outs = run(own_x, own)
        given = [g.to(outs[0].dtype) for g in upstream]
        wanted = [g for i, g in enumerate(given) if i in used]
        return torch.autograd.grad([outs[i] for i in used], leaves, wanted, allow_unused=True)

    found, again = (
        gradients(lambda x, n: project(x, n, norms, head_size=size, backend=backend), None) for _ in range(2)
    )
    true = gradients(lambda x, n: formula(x, n, norms, size, torch.float64), torch.float64)
    plain = gradients(lambda x, n: formula(x, n, norms, size, dtype), dtype)
    assert_gradients_as_good_as(found, again, plain, true, floor=3e-6)


def test_norms_that_are_trained_get_their_gradient(backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears, norms = make(device=device)
    trained = [tuple(w.clone().requires_grad_() for w in pair) for pair in norms]
    q, k, v = project(x, linears, trained, head_size=16, backend=backend)
    found = torch.autograd.grad((q.square().sum() + k.sum() + v.sum()), [w for pair in trained for w in pair])
    exact = [tuple(w.double().clone().requires_grad_() for w in pair) for pair in norms]
    q, k, v = formula([t.double() for t in x], linears, exact, 16, torch.float64)
    true = torch.autograd.grad((q.square().sum() + k.sum() + v.sum()), [w for pair in exact for w in pair])
    for got, slope in zip(found, true, strict=True):
        assert_as_good_as(got, slope.float(), slope, name="weight of a norm", floor=5e-6)


def test_refuses():
    x, linears, norms = make()
    good = {"x": x, "linears": linears, "norms": norms, "head_size": 16}
    two, third = [linears[0][:2], linears[1][:2]], [norms[0], (norms[1][0], norms[1][1][:3])]
    mixed = [norms[0], tuple(w.to(torch.bfloat16) for w in norms[1])]
    name = r"projections\[0\]\[0\].end"
    for bad, message in (
        ({"head_size": 0}, rf"{name}.size is 0"), ({"head_size": 7}, rf"{name}.size is 7; it takes a divisor of 48"),
        ({"linears": two}, r"projections is packed as \[\['HeadNorm', 'HeadNorm'\]"),
        ({"norms": third}, r"projections\[1\]\[1\].end.weight is"), ({"eps": -1.0}, rf"{name}.eps is -1.0"),
        ({"norms": mixed}, r"projections\[1\]\[0\].end.weight is torch.bfloat16"),
        ({"x": [x[0], x[1].double()]}, r"x\[1\] is torch.float64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"adapted_projections: {message}"):
            project(**good | bad)


def test_where_ends_are_taken_is_told():
    assert set(ops.ends_inside("triton")) == {"Gelu", "IntoResidual", "HeadNorm"}
    assert not any(ops.ends_inside("triton").values())
    assert all("a library's product" in reasons[0] for reasons in ops.ends_inside("cpp").values())


def described(linears, norms, size=16, **settings):
    """A call whose first projections of each stream are normed."""
    x, projections = [torch.zeros(1, 2, 40)] * 2, []
    for layers, weights in zip(linears, norms, strict=True):
        ends = [*(HeadNorm(weight, size, invertible=True) for weight in weights), Packed()]
        ends = [replace(end, **settings) if isinstance(end, HeadNorm) else end for end in ends]
        of_stream = zip(layers, ends, strict=True)
        projections.append([Projection(w, b, None if a is None else Adapter(a, c), e) for (w, b, a, c), e in of_stream])
    return Description(x, [2, 2], shared=False, projections=projections)


def test_a_norm_that_does_not_fit_follows_behind_the_product():
    """Values are still packed by the product where that has an adapter; without any, a library makes all three."""
    _, linears, norms = make()
    _, plain, _ = make(adapted=())
    _, wide, wide_norms = make(size=24, heads=2)
    tables = torch.ones(4, 16), torch.zeros(4, 16)
    cases = [
        (described(linears, norms), _projection_triton, 6),
        (described(linears, norms, rotary=tables), _projection_triton, 2),
        (described(linears, norms, invertible=False), _projection_triton, 2),
        (described(wide, wide_norms, size=24), _projection_triton, 2),
        (described(plain, norms), _projection_torch, 0),
    ]
    for call, products, inside in cases:
        chosen = route(call, "triton")
        assert chosen.products is products
        assert sum(p.end is not None for p in chosen.description.every()) == inside
        assert route(call, "cpp").products is _projection_torch
