"""Both streams of tokens through their projections at once, against the projections one by one."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_as_good_as
from ops.exact import draw
from ops.test_adapted_projection import NAMES, SCALING, described, inputs
from torch.nn import functional

from fdfo_engine import ops
from fdfo_engine.ops import Packed

TOKENS = (7, 3)


def streams_of(dtype, device, *, ranks=((4, 4, 4), (4, 4, 4)), bias=True):
    """Two streams of three layers, x packed with two tokens past them, and a LoRA where its rank is not 0."""
    K, N = 24, 20
    x = draw(2, sum(TOKENS) + 2, K, seed=50, dtype=dtype, device=device).requires_grad_()
    linears = []
    for s, of_stream in enumerate(ranks):
        several = [
            inputs((1,), K, N, max(r, 1), dtype=dtype, device=device, seed=10 * s + i) for i, r in enumerate(of_stream)
        ]
        layers = [[one[name] for name in NAMES[1:]] for one in several]
        for layer, rank in zip(layers, of_stream, strict=True):
            layer[1] = layer[1] if bias else None
            layer[2:] = layer[2:] if rank else (None, None)
        linears.append(layers)
    return x, linears


def projections_of(linears, *, packed=False):
    """Of each stream; the last ones packed along tokens, if so."""
    found = [[described(*layer) for layer in layers] for layers in linears]
    if packed:
        found = [[*layers, replace(last, end=Packed())] for *layers, last in found]
    return found


def streams_run(x, linears, upstream, *, packed, whole, backend):
    """Outputs and gradients; without a backend in float64, by the formula."""
    parts = x.split([*TOKENS, 2], 1)[:2]
    if backend is None:
        ys = [
            [functional.linear(t, w, b) + (0 if a is None else SCALING * (t @ a.T) @ c.T) for w, b, a, c in layers]
            for t, layers in zip(parts, linears, strict=True)
        ]
        joined = torch.cat([layers.pop() for layers in ys], 1) if packed else None
    else:
        given = {"x": x, "tokens": TOKENS} if whole else {"x": parts}
        projections = projections_of(linears, packed=packed)
        ys, joined, _ = ops.adapted_projections(projections=projections, backend=backend, **given)
        (joined,) = joined or [None]
    out = [y for layers in ys for y in layers] + ([joined] if packed else [])
    leaves = [x, *(t for layers in linears for layer in layers for t in layer if t is not None)]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize(
    ("ranks", "packed", "whole"),
    [(((4, 4, 4), (4, 4, 4)), True, False), (((4, 4, 4), (4, 4, 4)), False, True), (((4, 0, 2), (0, 0, 0)), True, True),
     (((4, 0, 2), (0, 0, 0)), False, True), (((40, 3), (4, 4, 4)), True, False)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_are_their_layers(dtype, packed, whole, ranks, backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears = streams_of(dtype, device, ranks=ranks, bias=whole)
    wide = x.detach().double().requires_grad_()
    wide_linears = [
        [[None if t is None else t.detach().double().requires_grad_() for t in n] for n in ls] for ls in linears
    ]
    counts = [len(layers) - packed for layers in linears]
    shapes = [(2, count, 20) for count, layers in zip(TOKENS, counts, strict=True) for _ in range(layers)]
    shapes += [(2, sum(TOKENS), 20)] if packed else []
    upstream = [draw(*shape, seed=70 + i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]
    settings = {"packed": packed, "whole": whole}
    want = streams_run(wide, wide_linears, [g.double() for g in upstream], backend=None, **settings)
    found = streams_run(x, linears, upstream, backend=backend, **settings)
    if dtype == torch.float32:
        other = [value.float() for value in want]
    else:
        other = streams_run(x, short(linears), upstream, backend=None, **settings)
    for i, (actual, plain, value) in enumerate(zip(found, other, want, strict=True)):
        assert actual.shape == value.shape
        assert_as_good_as(actual, plain, value, name=f"output or gradient {i}", floor=2e-6)


def short(linears):
    """The adapters in bfloat16, as PEFT computes with them."""
    return [[[None if t is None else t.detach().bfloat16().requires_grad_() for t in n] for n in ls] for ls in linears]


def test_a_stream_whose_outputs_are_not_used(backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears = streams_of(torch.float32, device)
    used, _ = ops.adapted_projections(x, projections_of(linears), tokens=TOKENS, backend=backend).streams
    dx, da = torch.autograd.grad(used[1].sum(), (x, linears[0][1][2]))
    weight, _, a, b = (t.detach() for t in linears[0][1])
    want = (weight + SCALING * b @ a).sum(0).expand(2, TOKENS[0], -1)
    assert_as_good_as(dx[:, : TOKENS[0]], want, want, name="x")
    assert not dx[:, TOKENS[0] :].any()
    want = SCALING * b.sum(0)[:, None] * x.detach()[:, : TOKENS[0]].sum((0, 1))
    assert_as_good_as(da, want, want, name="lora_a")


def test_streams_in_one_tensor_are_not_copied_where_triton_runs():
    x, linears = streams_of(torch.float32, "cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.adapted_projections(x, projections_of(linears), tokens=TOKENS, backend="triton")
    given = {x.data_ptr(), *(t.data_ptr() for layers in linears for layer in layers for t in layer)}
    others = [t for t in saved if t.data_ptr() not in given]
    assert [tuple(t.shape) for t in others] == [(2 * count, 12) for count in TOKENS]  # s x A^T alone


def test_streams_refuse():
    x, linears = streams_of(torch.float32, "cpu")
    for bad, message in (
        ({"linears": []}, r"projections is of lengths \[\]"),
        ({"linears": [linears[0], []]}, r"projections is of lengths \[3, 0\]"),
        ({"tokens": None}, "x is 1 tensors"),
        ({"tokens": (7, 30)}, r"tokens is \[7, 30\]"),
        ({"tokens": (7,)}, r"tokens is \[7\]"),
        ({"x": [x, x[:1]], "tokens": None}, r"x\[1\] is"),
        ({"x": [x, x[..., :3]], "tokens": None}, r"x\[1\] is"),
        ({"linears": [linears[0], [[linears[1][0][0][:5], *linears[1][0][1:]]]]}, r"projections\[1\]\[0\].bias is"),
    ):
        given = {"x": x, "linears": linears, "tokens": TOKENS} | bad
        projections = projections_of(given.pop("linears"))
        with pytest.raises(ValueError, match=f"adapted_projections: {message}"):
            ops.adapted_projections(projections=projections, **given)


def test_packed_projections_need_their_counterparts():
    x, linears = streams_of(torch.float32, "cpu")
    first, second = projections_of(linears, packed=True)
    alone = [first, projections_of(linears)[1]]
    small = [*second[:-1], replace(second[-1], weight=second[-1].weight[:8], bias=None, adapter=None)]
    for projections in (alone, [first, small]):
        with pytest.raises(ValueError, match="adapted_projections: projections is packed to sizes"):
            ops.adapted_projections(x, projections, tokens=TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_have_scales_of_their_own(dtype, backend, device):
    """Of different projections, and of the two streams; by the formula, and alone each projection is the same."""
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears = streams_of(dtype, device)
    scales, upstream = [[0.75, -2.0, 0.5], [3.0, 0.75, 0.1]], draw(2, max(TOKENS), 20, dtype=dtype, device=device)

    def outputs(x, linears, dtype):
        parts = x.split([*TOKENS, 2], 1)[:2]
        return [
            functional.linear(part, w, c) + scale * (part @ a.to(dtype).T) @ b.to(dtype).T
            for part, layers, of_stream in zip(parts, linears, scales, strict=True)
            for (w, c, a, b), scale in zip(layers, of_stream, strict=True)
        ]

    def gradients(ys, x, linears, dtype):
        leaves = [x, *(t for layers in linears for layer in layers for t in layer)]
        return torch.autograd.grad(ys, leaves, [upstream[:, : y.shape[1]].to(dtype) for y in ys])

    wide = x.detach().double().requires_grad_()
    wide_linears = [[[t.detach().double().requires_grad_() for t in n] for n in layers] for layers in linears]
    exact = outputs(wide, wide_linears, torch.float64)
    plain = outputs(x, linears, dtype)
    described_ = [
        [described(*layer, scaling=scale) for layer, scale in zip(layers, of_stream, strict=True)]
        for layers, of_stream in zip(linears, scales, strict=True)
    ]
    found = ops.adapted_projections(x, described_, tokens=TOKENS, backend=backend).streams
    found = [y for of_stream in found for y in of_stream]
    runs = ((found, x, linears, dtype), (plain, x, linears, dtype), (exact, wide, wide_linears, torch.float64))
    results = ([*run[0], *gradients(*run)] for run in runs)
    for i, (actual, other, value) in enumerate(zip(*results, strict=True)):
        assert_as_good_as(actual, other, value, name=f"output or gradient {i}", floor=2e-6)


@pytest.mark.parametrize("ended", [(True, True), (True, False)], ids=["all", "the first of each stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_of_several_projections(dtype, ended, backend, device):
    """Of all of a call, which backend triton takes inside its products, or of some, which it can't."""
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, linears = streams_of(dtype, device, ranks=((4, 4), (4, 4)))
    upstream = draw(2, max(TOKENS), 20, dtype=dtype, device=device)

    def formula(x, linears, dtype):
        ys = []
        for part, layers in zip(x.split([*TOKENS, 2], 1), linears, strict=False):
            for (w, c, a, b), gelu in zip(layers, ended, strict=True):
                y = functional.linear(part, w, c) + SCALING * (part @ a.to(dtype).T) @ b.to(dtype).T
                ys.append(functional.gelu(y, approximate="tanh") if gelu else y)
        return ys

    def op(x, linears, dtype):
        projections = [[described(*n, gelu=gelu) for n, gelu in zip(layers, ended, strict=True)] for layers in linears]
        found = ops.adapted_projections(x, projections, tokens=TOKENS, backend=backend).streams
        return [y for of_stream in found for y in of_stream]

    def run(function, dtype, given=dtype):
        own_x = x.detach().to(given).requires_grad_()
        own = [
            [[t.detach().to(torch.promote_types(t.dtype, given)).requires_grad_() for t in n] for n in layers]
            for layers in linears
        ]
        ys = function(own_x, own, dtype)
        leaves = [own_x, *(t for layers in own for layer in layers for t in layer)]
        return [*ys, *torch.autograd.grad(ys, leaves, [upstream[:, : y.shape[1]].to(y.dtype) for y in ys])]

    exact = run(formula, torch.float64, torch.float64)
    for i, (actual, plain, value) in enumerate(zip(run(op, dtype), run(formula, dtype), exact, strict=True)):
        assert_as_good_as(actual, plain, value, name=f"output or gradient {i}", floor=2e-6)
