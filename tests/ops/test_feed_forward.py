import pytest
import torch
from numerics import assert_as_good_as
from ops.exact import draw
from torch.nn import functional

from fdfo_engine import ops
from fdfo_engine.ops import _gelu
from fdfo_engine.ops.feed_forward import feed_forward_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "w1", "b1", "w2", "b2")
SHAPES = [((1,), 1, 1, 1), ((3, 7), 7, 33, 5), ((4, 16), 96, 257, 96)]  # the last one: past a block of the GELU


def inputs(lead=(2, 3), K=7, H=9, N=5, dtype=torch.float32, device="cpu"):
    shapes = ((*lead, K), (H, K), (H,), (N, H), (N,))
    scales = (1.0, 2 * K**-0.5, 1.0, H**-0.5, 1.0)
    found = [s * draw(*shape, seed=i) for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))]
    return {name: t.to(device, dtype).requires_grad_() for name, t in zip(NAMES, found, strict=True)}


def reference(arguments, upstream, dtype=None):
    """Value and gradients of the specification, in its own dtype or in `dtype`."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in arguments.values()]
    y = feed_forward_reference(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.fixture
def feed_forward(backend):
    if backend not in ops.implementations()["feed_forward"]:
        pytest.skip(f"not written in {backend}")

    def feed_forward(*arguments, **settings):
        return ops.feed_forward(*arguments, backend=backend, **settings)

    return feed_forward


def run(feed_forward, arguments, upstream, **settings):
    y = feed_forward(*arguments.values(), **settings)
    return [y, *torch.autograd.grad(y, list(arguments.values()), upstream)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(shape, dtype, recompute, device, feed_forward):
    arguments = inputs(*shape, dtype=dtype, device=device)
    upstream = draw(*shape[0], shape[3], seed=9, dtype=dtype, device=device)
    found = run(feed_forward, arguments, upstream, recompute=recompute)
    plain, exact = reference(arguments, upstream), reference(arguments, upstream, torch.float64)
    # of few elements, roundings don't average out, and the plain code's may cancel by chance: which ones do depends on
    # the CPU's matrix products. On one element it is two roundings, on a few hundred one.
    roundings = {SHAPES[0]: 2, SHAPES[1]: 1}.get(shape, 0) if dtype != torch.float32 else 0
    floor = roundings * torch.finfo(dtype).eps / 2 or 1e-6
    for name, actual, other, value in zip(("y", *NAMES), found, plain, exact, strict=True):
        assert (actual.dtype, actual.shape) == (dtype, value.shape)
        assert_as_good_as(actual, other, value, name=name, floor=floor)


def test_without_biases(device, feed_forward):
    x, w1, _, w2, _ = inputs(device=device).values()
    want = feed_forward_reference(x, w1, None, w2, None)
    got = feed_forward(x, w1, None, w2, None)
    assert_as_good_as(got, want, want, name="y")
    for actual, value in zip(*(torch.autograd.grad(y.sum(), (x, w1)) for y in (got, want)), strict=True):
        assert_as_good_as(actual, value, value, name="gradient")


@pytest.mark.parametrize("trained", [("x",), ("w1",), ("b1", "b2"), ("w2",), ("b2",)], ids=str)
def test_only_what_is_trained_gets_a_gradient(trained, device, feed_forward):
    arguments = {name: t.detach().requires_grad_(name in trained) for name, t in inputs(device=device).items()}
    feed_forward(*arguments.values()).sum().backward()
    exact = reference(inputs(device=device), torch.ones(2, 3, 5, device=device), torch.float64)[1:]
    for (name, t), value in zip(arguments.items(), exact, strict=True):
        assert (t.grad is not None) == (name in trained)
        if t.grad is not None:
            assert_as_good_as(t.grad, value, value, name=name)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_keeps_one_tensor_for_the_backward(recompute, device, feed_forward):
    x, *weights = (t.detach() for t in inputs(device=device).values())
    y = feed_forward(x.requires_grad_(), *weights, recompute=recompute)
    saved = y.grad_fn.saved_tensors  # of a live y: torch 2.11 lets go of them with it
    pointers = {t.data_ptr() for t in weights}
    kept = [t for t in saved if t is not None and t.data_ptr() not in pointers]
    assert [t.shape for t in kept] == [(6, 7) if recompute else (6, 9)]


def test_strided_input(device, feed_forward):
    arguments = inputs((4, 5), device=device)
    strided = {n: t.detach().T.contiguous().T if t.ndim == 2 else t.detach() for n, t in arguments.items()}
    wide = torch.zeros(4, 5, 14, device=device)
    wide[..., ::2] = arguments["x"].detach()
    strided["x"], strided["b1"] = wide[..., ::2], arguments["b1"].detach().repeat_interleave(2)[::2]
    for t in strided.values():
        t.requires_grad_()
    upstream = draw(5, 5, 4, device=device).permute(2, 1, 0)
    found = [run(feed_forward, tensors, g) for tensors, g in ((arguments, upstream.contiguous()), (strided, upstream))]
    for name, actual, value in zip(("y", *NAMES), *reversed(found), strict=True):
        assert_as_good_as(actual, value, value, name=name)


def test_repeats_bit_for_bit_and_writes_into_no_input(device, feed_forward):
    arguments, upstream = inputs(device=device), draw(2, 3, 5, device=device)
    before = [t.detach().clone() for t in (*arguments.values(), upstream)]
    runs = [run(feed_forward, arguments, upstream, recompute=again) for again in (False, False, True)]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
    assert all(map(torch.equal, (*arguments.values(), upstream), before))
    with torch.no_grad():
        assert torch.equal(feed_forward(*arguments.values()), runs[0][0])


def test_no_rows(device, feed_forward):
    y, dx, *rest = run(feed_forward, inputs((0,), device=device), torch.zeros(0, 5, device=device))
    assert (y.shape, dx.shape) == ((0, 5), (0, 7))
    assert all((g == 0).all() for g in rest)


def test_gelu_over_the_whole_line(backend, device):
    """To a few last bits, and with value and slope 0 or h and 1 where its cube overflows."""
    if backend not in ops.implementations()["feed_forward"]:
        pytest.skip(f"not written in {backend}")
    far = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 9.9, -9.9, 40.0, -40.0, 1e20, -1e20, 3e38, -3e38])
    h = torch.cat([torch.linspace(-12, 12, 4001), far]).to(device).view(1, -1)
    one = torch.ones_like(h)
    value = _gelu.forward(h, None, backend, inplace=False)
    slope, again = _gelu.backward(h, None, one, backend, inplace=False, activation=True)
    wide = h.double().clamp(-1e6, 1e30).requires_grad_()  # in float64 the cube of 1e30 is finite
    exact = functional.gelu(wide, approximate="tanh")
    near = h.abs() < 100
    for actual, want in ((value, exact.detach()), (slope, torch.autograd.grad(exact.sum(), wide)[0])):
        relative = (actual.double() - want).abs() / want.abs().clamp(0.1)
        assert relative[near].max() < (5e-7 if backend != "torch" else 2e-5)
    assert torch.equal(value, again)
    if backend != "torch":  # its slope is NaN there
        assert (slope[~near] - (h[~near] > 0).float()).abs().max() < 1e-30
        assert torch.equal(value[h > 100], h[h > 100])
        assert value[h < -100].abs().max() < 1e-30
    assert _gelu.forward(torch.full((1, 1), float("nan"), device=device), None, backend, inplace=False).isnan().all()


def test_a_step_down_the_gradient_lowers_the_error(device, feed_forward):
    tensors = inputs((32,), device=device)
    target = draw(32, 5, device=device)
    before = (feed_forward(*tensors.values()) - target).square().mean()
    grads = torch.autograd.grad(before, list(tensors.values()))
    moved = [t - 0.01 * g for t, g in zip(tensors.values(), grads, strict=True)]
    assert (feed_forward(*moved) - target).square().mean() < before


GOOD = {name: t.detach() for name, t in inputs().items()}
REFUSALS = [
    ({"x": GOOD["x"].double()}, "x is torch.float64"),
    ({"x": GOOD["x"][..., :0]}, "x is"),
    ({"w1": GOOD["w1"].bfloat16()}, "w1 is torch.bfloat16"),
    ({"w1": GOOD["w1"][:, :3]}, "w1 is"),
    ({"b1": GOOD["b1"][:2]}, "b1 is"),
    ({"w2": GOOD["w2"][:, :2]}, "w2 is"),
    ({"w2": GOOD["w2"].to("meta")}, "w2 is on meta"),
    ({"b2": GOOD["b2"].half()}, "b2 is torch.float16"),
    ({"b2": 3}, "b2 is int"),
    ({"backend": "fast"}, "backend is 'fast'"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSALS)])
def test_refuses(bad, message):
    with pytest.raises(ValueError, match=f"feed_forward: {message}"):
        ops.feed_forward(**GOOD | bad)


@pytest.mark.parametrize("trained", ["all", "inputs"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_input_beside(dtype, recompute, trained, backend, device):
    """As one product of both, joined; autograd keeps the second weight itself, not a view of it."""
    shapes = ((2, 5, 12), (18, 12), (18,), (8, 10 + 18), (8,), (2, 5, 10))
    leaves = [(draw(*s, seed=i) * s[-1] ** -0.5).to(device, dtype) for i, s in enumerate(shapes)]
    wanted = range(6) if trained == "all" else (0, 5)
    upstream = draw(2, 5, 8, seed=9, dtype=dtype, device=device)

    def joined(x, w1, b1, w2, b2, beside):
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, w1, b1), approximate="tanh")
        return torch.nn.functional.linear(torch.cat([beside, hidden], 2), w2, b2)

    def run(tensors, function, upstream):
        given = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        y = function(*given)
        return [y, *torch.autograd.grad(y, [given[i] for i in wanted], upstream)]

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = run(
            leaves, lambda *a: ops.feed_forward(*a[:5], beside=a[5], recompute=recompute, backend=backend), upstream
        )
    of_w2 = [t for t in saved if t.untyped_storage().data_ptr() == leaves[3].untyped_storage().data_ptr()]
    assert [tuple(t.shape) for t in of_w2] == [(8, 28)]
    assert not any(t._is_view() for t in of_w2)
    exact = run([t.double() for t in leaves], joined, upstream.double())
    for i, (actual, plain, value) in enumerate(zip(found, run(leaves, joined, upstream), exact, strict=True)):
        assert_as_good_as(actual, plain, value, name=str(i), floor=2e-6)
