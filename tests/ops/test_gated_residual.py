import pytest
import torch
from numerics import assert_as_good_as
from ops.exact import check, draw, modulated_norm

from fdfo_engine import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 2, 1536), (2, 3, 130)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
CASES.append(((2, 33, 17), torch.bfloat16))  # one past the tokens of a partial sum; slow where interpreted
NAMES = ("x", "y", "gate", "scale", "shift", "scale2", "shift2")


@pytest.fixture
def gated_residual(backend):
    def gated_residual(*tensors):
        return ops.gated_residual(*tensors, backend=backend)

    return gated_residual


@pytest.fixture
def gated_residual_norm(backend):
    def gated_residual_norm(*tensors):
        second = dict(zip(NAMES[5:], tensors[5:], strict=False))
        return ops.gated_residual_norm(*tensors[:5], **second, backend=backend)

    return gated_residual_norm


def inputs(shape=(2, 3, 130), dtype=torch.float32, device="cpu", rows=1):
    """x, y and `rows` of gate and modulations, views of a wider row."""
    B, _, D = shape
    tokens = [draw(*shape, seed=seed, dtype=dtype, device=device) for seed in (0, 1)]
    wide = draw(B, 6 * D, seed=2, dtype=dtype, device=device).chunk(6, dim=1)
    return [t.detach().requires_grad_() for t in (*tokens, *wide[:rows])]


def upstream(like, seed=7):
    return draw(*like.shape, seed=seed, dtype=like.dtype, device=like.device)


def exact(tensors, upstreams, x_new):
    """Outputs and gradients in float64, of the norm at the x_new that was rounded."""
    x, y, gate, *modulations = wide = [t.detach().cpu().double().requires_grad_() for t in tensors]
    sum_ = x + gate[:, None] * y
    joined = sum_ + (x_new.detach().cpu().double() - sum_).detach()
    norms = [modulated_norm(joined, *modulations[i : i + 2]) for i in range(0, len(modulations), 2)]
    gradients = torch.autograd.grad([sum_, *norms], wide, [u.cpu().double() for u in upstreams])
    return [out.detach() for out in (sum_, *norms)], gradients


@pytest.mark.parametrize("rows", [1, 3, 5], ids=["residual", "norm", "two norms"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_value_and_gradient(shape, dtype, rows, device, gated_residual, gated_residual_norm):
    tensors = inputs(shape, dtype, device, rows)
    outputs = (gated_residual(*tensors),) if rows == 1 else gated_residual_norm(*tensors)
    upstreams = [upstream(out, seed) for seed, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, tensors, upstreams)
    values, slopes = exact(tensors, upstreams, outputs[0])
    for actual, what, name in zip(outputs, values, ("x_new", "n", "n2"), strict=False):
        assert actual.dtype == dtype
        check(actual, what, name)
    for actual, what, name in zip(gradients, slopes, NAMES, strict=False):
        assert actual.dtype == dtype
        check(actual, what, f"d {name}")


def test_both_in_one_pass_are_the_two_ops(device, backend, gated_residual, gated_residual_norm):
    tensors = inputs(dtype=torch.bfloat16, device=device, rows=3)
    x_new, n = gated_residual_norm(*tensors)
    assert torch.equal(x_new, gated_residual(*tensors[:3]))
    assert torch.equal(n, ops.layer_norm_modulate(x_new, *tensors[3:], backend=backend))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_is_used(used, device, gated_residual_norm):
    tensors = inputs(device=device, rows=3)
    outputs = gated_residual_norm(*tensors)
    upstreams = [upstream(outputs[0], i) * (i == used) for i in range(2)]
    gradients = torch.autograd.grad(outputs[used], tensors, upstreams[used], materialize_grads=True)
    for actual, what, name in zip(gradients, exact(tensors, upstreams, outputs[0])[1], NAMES, strict=False):
        check(actual, what, f"d {name}")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_only_what_is_needed_gets_a_gradient(wanted, rows, device, gated_residual, gated_residual_norm):
    tensors = [t.detach() for t in inputs(device=device, rows=rows)]
    for i in wanted:
        tensors[i].requires_grad_()
    outputs = (gated_residual(*tensors),) if rows == 1 else gated_residual_norm(*tensors)
    upstreams = [upstream(out, seed) for seed, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [tensors[i] for i in wanted], upstreams)
    slopes = exact(tensors, upstreams, outputs[0])[1]
    for i, actual in zip(wanted, gradients, strict=True):
        check(actual, slopes[i], f"d {NAMES[i]}")


def test_a_fast_backend_keeps_one_stream_and_its_statistics(device, backend, gated_residual, gated_residual_norm):
    if backend == "torch":
        pytest.skip("plain autograd keeps more")
    x, y, *rows = (t.detach() for t in inputs(device=device, rows=3))
    x.requires_grad_()
    y.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_residual(x, y, rows[0])
        assert sum(t.numel() for t in kept) == rows[0].numel()
        kept.clear()
        gated_residual_norm(x, y, *rows)
    assert sum(t.numel() for t in kept) == x.numel() + 2 * x[..., 0].numel() + rows[0].numel() + rows[1].numel()
    kept.clear()
    with torch.no_grad():
        assert not gated_residual_norm(x, y, *rows)[1].requires_grad


@pytest.mark.parametrize("rows", [1, 3])
def test_strided_input_and_upstream(rows, device, gated_residual, gated_residual_norm):
    tensors = inputs(device=device, rows=rows)
    lay = [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),  # tokens first
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),  # elements apart
        lambda t: t,
    ]
    found = []
    for strided in lay:
        laid = strided(tensors[0]), strided(tensors[1]), *tensors[2:]
        outputs = (gated_residual(*laid),) if rows == 1 else gated_residual_norm(*laid)
        found.append((*outputs, *torch.autograd.grad(outputs, tensors, [strided(upstream(out)) for out in outputs])))
    for other in found[:2]:
        assert all(map(torch.equal, other, found[2]))


@pytest.mark.parametrize("rows", [1, 5])
def test_repeats_bit_for_bit_and_writes_into_no_input(rows, device, gated_residual, gated_residual_norm):
    tensors = inputs((1, 33, 5), torch.bfloat16, device, rows)
    before = [t.detach().clone() for t in tensors]
    found = []
    for _ in range(2):
        outputs = (gated_residual(*tensors),) if rows == 1 else gated_residual_norm(*tensors)
        found.append((*outputs, *torch.autograd.grad(outputs, tensors, [upstream(out) for out in outputs])))
    assert all(map(torch.equal, *found))
    assert all(map(torch.equal, tensors, before))


def test_a_closed_gate_leaves_the_stream_and_teaches_the_block_nothing(device, gated_residual):
    x, y, gate = inputs(device=device)
    out = gated_residual(x, y, 0 * gate)
    dx, dy = torch.autograd.grad(out, (x, y), upstream(out))
    assert torch.equal(out, x)
    assert torch.equal(dx, upstream(out))
    assert (dy == 0).all()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5)], ids=str)
def test_no_tokens(shape, rows, device, gated_residual, gated_residual_norm):
    tensors = inputs(shape, device=device, rows=rows)
    outputs = (gated_residual(*tensors),) if rows == 1 else gated_residual_norm(*tensors)
    gradients = torch.autograd.grad([out.sum() for out in outputs], tensors)
    assert all(out.shape == shape for out in outputs)
    assert all((g == 0).all() and g.shape == t.shape for g, t in zip(gradients, tensors, strict=True))


X, ROW = torch.zeros(2, 3, 4), torch.zeros(2, 4)
REFUSALS = [
    ({"x": X.double()}, "x is torch.float64"),
    ({"x": X[0]}, "x is"),
    ({"y": X[:, :2]}, "y is"),
    ({"y": X.half()}, "y is torch.float16"),
    ({"y": X.to("meta")}, "y is on meta"),
    ({"gate": X}, "gate is"),
    ({"gate": None}, "gate is NoneType"),
    ({"backend": "fast"}, "backend is 'fast'"),
]
NORM_REFUSALS = [
    *REFUSALS,
    ({"scale": ROW[:1]}, "scale is"),
    ({"shift": X}, "shift is"),
    ({"scale2": ROW}, "shift2 is None"),
    ({"eps": float("inf")}, "eps is inf"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSALS)])
def test_residual_refuses(bad, message):
    with pytest.raises(ValueError, match=f"gated_residual: {message}"):
        ops.gated_residual(**{"x": X, "y": X, "gate": ROW} | bad)


@pytest.mark.parametrize(("bad", "message"), NORM_REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(NORM_REFUSALS)])
def test_norm_refuses(bad, message):
    with pytest.raises(ValueError, match=f"gated_residual_norm: {message}"):
        ops.gated_residual_norm(**{"x": X, "y": X, "gate": ROW, "scale": ROW, "shift": ROW} | bad)


def both_streams(backend, device, dtype, kinds):
    """Each kind of stream, its leaves, and what `gated_residual_norm` or `layer_norm_modulate` alone makes of it."""
    found = []
    for i, kind in enumerate(kinds):
        x, y, *rows = inputs((2, 5 - 2 * i, 130), dtype, device, rows=5)
        gate, scale, shift, scale2, shift2 = rows
        second = {"scale2": scale2, "shift2": shift2} if "two" in kind else {}
        if "gate" in kind:
            stream = ops.NormStream(x, scale, shift, y, gate, **second)
            alone = ops.gated_residual_norm(x, y, gate, scale, shift, **second, backend=backend)
        else:
            stream = ops.NormStream(x, scale, shift, **second)
            alone = ops.layer_norm_modulate(x, scale, shift, **second, backend=backend)
            alone = (x, *alone) if second else (x, alone)
        found.append((stream, [t for t in stream if t is not None], alone))
    return found


@pytest.mark.parametrize("kinds", [("gate two", "gate"), ("two", "plain"), ("plain", "gate"), ("gate",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_together_are_as_alone(dtype, kinds, backend, device):
    """To the bit, outputs and gradients, and where a stream's outputs are not used."""
    streams = both_streams(backend, device, dtype, kinds)
    together = ops.gated_residual_norms([stream for stream, _, _ in streams], backend=backend)
    for outputs, (_, _, alone) in zip(together, streams, strict=True):
        assert len(outputs) == len(alone)
        assert all(map(torch.equal, outputs, alone))
    for used in ([0], list(range(len(streams)))):
        leaves = [t for i in used for t in streams[i][1]]
        results = []
        for outs in (together, [alone for _, _, alone in streams]):
            flat = [t for i in used for t in outs[i][streams[i][0].gate is None :]]
            results.append(torch.autograd.grad(flat, leaves, [upstream(t) for t in flat], retain_graph=True))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_x_without_a_gate_passes_through(dtype, backend, device):
    """Its gradient is that of the norm plus what came to x itself, rounded once."""
    x, _, scale, shift = inputs((2, 5, 130), dtype, device, rows=2)
    ((same, n),) = ops.gated_residual_norms([ops.NormStream(x, scale, shift)], backend=backend)
    assert torch.equal(same, x)
    to_x, to_n = upstream(same), upstream(n, 8)
    (found,) = torch.autograd.grad([same, n], x, [to_x, to_n])
    wide = [t.detach().double().requires_grad_() for t in (x, scale, shift)]
    (of_norm,) = torch.autograd.grad(modulated_norm(*wide), wide[0], to_n.double())
    true = to_x.double() + of_norm
    assert_as_good_as(found, true.to(dtype), true, name="x", floor=2e-6)


def test_a_stream_without_tokens_beside_one_with(backend, device):
    (full, leaves, alone), _ = both_streams(backend, device, torch.float32, ("gate", "gate"))
    none = full._replace(x=full.x[:, :0], y=full.y[:, :0])
    (first, second) = ops.gated_residual_norms([none, full], backend=backend)
    assert first[1].shape == (2, 0, 130)
    assert torch.equal(second[1], alone[1])
    found = torch.autograd.grad(first[1].sum() + second[1].sum(), leaves)
    assert all(map(torch.equal, found, torch.autograd.grad(alone[1].sum(), leaves)))


GOOD = ops.NormStream(X, ROW, ROW, X, ROW)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([], "streams is of length 0"),
        ([GOOD] * 3, "streams is of length 3; it takes one to 2"),
        ([GOOD, GOOD._replace(gate=None)], r"streams\[1\].gate is None"),
        ([GOOD, GOOD._replace(y=None)], r"streams\[1\].y is None"),
        ([GOOD, GOOD._replace(x=X[:1])], r"streams\[1\].x is"),
        ([GOOD, GOOD._replace(x=X.half())], r"streams\[1\].x is"),
        ([GOOD, GOOD._replace(x=X.to("meta"))], r"streams\[1\].x is on meta; it takes tensors on one device, here cpu"),
        ([GOOD, GOOD._replace(scale=X)], "scale is"),
    ],
)
def test_streams_refuse(streams, message):
    with pytest.raises(ValueError, match=f"gated_residual_norms: {message}"):
        ops.gated_residual_norms(streams)
