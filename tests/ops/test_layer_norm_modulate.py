import pytest
import torch
from ops.exact import check, draw, modulated_norm

from fdfo_engine import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (1, 2, 1536), (2, 3, 130)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
CASES.append(((2, 33, 17), torch.bfloat16))  # one past the tokens of a partial sum; slow where interpreted
NAMES = ("x", "scale", "shift", "scale2", "shift2")


@pytest.fixture
def layer_norm_modulate(backend):
    def layer_norm_modulate(*tensors, **settings):
        second = dict(zip(NAMES[3:], tensors[3:], strict=False))
        return ops.layer_norm_modulate(*tensors[:3], **second, **settings, backend=backend)

    return layer_norm_modulate


def inputs(shape=(2, 3, 130), dtype=torch.float32, device="cpu", second=False):
    """x with a mean, and modulations as views of a wider row."""
    B, _, D = shape
    x = (draw(*shape, device=device) + 0.5).to(dtype)
    rows = draw(B, 6 * D, seed=1, dtype=dtype, device=device).chunk(6, dim=1)
    return [t.detach().requires_grad_() for t in (x, *rows[: 4 if second else 2])]


def upstream(like, seed=7):
    return draw(*like.shape, seed=seed, dtype=like.dtype, device=like.device)


def exact(tensors, upstreams):
    """Outputs and gradients in float64."""
    wide = [t.detach().cpu().double().requires_grad_() for t in tensors]
    outputs = [modulated_norm(wide[0], *wide[i : i + 2]) for i in range(1, len(wide), 2)]
    gradients = torch.autograd.grad(outputs, wide, [u.cpu().double() for u in upstreams])
    return [out.detach() for out in outputs], gradients


@pytest.mark.parametrize("second", [False, True], ids=["one", "two"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_value_and_gradient(shape, dtype, second, device, layer_norm_modulate):
    tensors = inputs(shape, dtype, device, second)
    outputs = layer_norm_modulate(*tensors)
    outputs = outputs if second else (outputs,)
    upstreams = [upstream(out, seed) for seed, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, tensors, upstreams)
    values, slopes = exact(tensors, upstreams)
    for actual, what in zip(outputs, values, strict=True):
        assert actual.dtype == dtype
        check(actual, what, "y")
    for actual, what, name in zip(gradients, slopes, NAMES, strict=False):
        assert actual.dtype == dtype
        if shape[2] > 1 or name != "x":
            check(actual, what, f"d {name}")
        else:
            assert (actual == 0).all(), "one element is its own mean"


def test_a_fast_backend_keeps_x_its_statistics_and_the_modulation(device, backend, layer_norm_modulate):
    if backend == "torch":
        pytest.skip("plain autograd keeps more")
    x, scale, shift = (t.detach() for t in inputs(device=device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm_modulate(x.requires_grad_(), scale, shift)
    assert sum(t.numel() for t in kept) == x.numel() + 2 * x[..., 0].numel() + scale.numel()
    kept.clear()
    layer_norm_modulate(x.detach(), scale, shift)
    assert not kept


def test_only_what_is_needed_gets_a_gradient(device, layer_norm_modulate):
    x, scale, shift = inputs(device=device)
    y = layer_norm_modulate(x, scale.detach(), shift.detach())
    check(torch.autograd.grad(y, x, upstream(y))[0], exact((x, scale, shift), [upstream(y)])[1][0], "dx")
    y = layer_norm_modulate(x.detach(), scale, shift.detach())
    check(torch.autograd.grad(y, scale, upstream(y))[0], exact((x, scale, shift), [upstream(y)])[1][1], "d scale")
    with torch.no_grad():
        assert not layer_norm_modulate(x, scale, shift).requires_grad


def test_one_of_two_outputs_is_used(device, layer_norm_modulate):
    tensors = inputs(device=device, second=True)
    outputs = layer_norm_modulate(*tensors)
    gradients = torch.autograd.grad(outputs[1], tensors, upstream(outputs[1]), materialize_grads=True)
    none = torch.zeros_like(outputs[0])
    for actual, what, name in zip(gradients, exact(tensors, [none, upstream(outputs[1])])[1], NAMES, strict=True):
        check(actual, what, f"d {name}")


def test_strided_input_and_upstream(device, layer_norm_modulate):
    tensors = inputs(device=device)
    x, scale, shift = tensors
    lay = [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),  # tokens first
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),  # elements apart
        lambda t: t,
    ]
    found = []
    for strided in lay:
        y = layer_norm_modulate(strided(x), scale, shift)
        found.append((y, *torch.autograd.grad(y, tensors, strided(upstream(y)))))
    for other in found[:2]:
        assert all(map(torch.equal, other, found[2]))
    y = layer_norm_modulate(*tensors)
    summed = torch.autograd.grad(y.sum(), tensors)  # an upstream without strides
    for actual, what, name in zip(summed, exact(tensors, [torch.ones_like(y)])[1], NAMES, strict=False):
        check(actual, what, f"d {name}")


def test_repeats_bit_for_bit_and_writes_into_no_input(device, layer_norm_modulate):
    tensors = inputs((1, 33, 5), torch.bfloat16, device, second=True)
    before = [t.detach().clone() for t in tensors]
    found = []
    for _ in range(2):
        outputs = layer_norm_modulate(*tensors)
        found.append((*outputs, *torch.autograd.grad(outputs, tensors, [upstream(y) for y in outputs])))
    assert all(map(torch.equal, *found))
    assert all(map(torch.equal, tensors, before))


def test_without_modulation_a_token_has_mean_0_and_variance_1(device, layer_norm_modulate):
    x, scale, shift = inputs(device=device)
    y = layer_norm_modulate(100 * x + 3, 0 * scale, 0 * shift).double()
    assert y.mean(-1).abs().max() < 1e-6
    assert (y.square().mean(-1) - 1).abs().max() < 1e-5


def test_a_far_mean_costs_no_more_than_in_torch(device, layer_norm_modulate):
    """The variance is of what is left after the mean, not a difference of two large sums."""
    x, scale, shift = inputs(device=device)
    far = (x + 1000).detach().requires_grad_()
    what = exact((far, scale, shift), [upstream(far)])[0][0]
    assert (layer_norm_modulate(far, scale, shift).cpu() - what).abs().max() < 3e-3  # float32 has 6e-5 at 1000


def test_a_constant_token_becomes_the_shift(device, layer_norm_modulate):
    x, scale, shift = inputs(device=device)
    y = layer_norm_modulate(torch.full_like(x, 2.0), scale, shift)
    assert torch.equal(y, shift[:, None].expand_as(y))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # if interpreted
def test_nan_and_infinity_stay_in_their_token(device, layer_norm_modulate):
    x, scale, shift = (t.detach().bfloat16() for t in inputs(device=device))
    x[0, 0, 3], x[1, 2, 129] = float("nan"), float("inf")
    y = layer_norm_modulate(x, scale, shift)
    assert y[0, 0].isnan().all()
    assert not y[1, 2].isfinite().any()
    y[0, 0] = y[1, 2] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5)], ids=str)
def test_no_tokens(shape, device, layer_norm_modulate):
    tensors = inputs(shape, device=device)
    y = layer_norm_modulate(*tensors)
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == shape
    assert all((g == 0).all() and g.shape == t.shape for g, t in zip(gradients, tensors, strict=True))


def test_no_second_derivative(device, backend):
    if backend == "torch":
        pytest.skip("plain autograd has one")
    x, scale, shift = inputs(device=device)
    y = ops.layer_norm_modulate(x, scale, shift, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


X, ROW = torch.zeros(2, 3, 4), torch.zeros(2, 4)
REFUSALS = [
    ({"x": X.double()}, "x is torch.float64"),
    ({"x": X[0]}, "x is"),
    ({"x": X[..., :0]}, "x is"),
    ({"scale": ROW[:1]}, "scale is"),
    ({"scale": ROW.bfloat16()}, "scale is torch.bfloat16"),
    ({"shift": ROW[:, :3]}, "shift is"),
    ({"shift": ROW.to("meta")}, "shift is on meta"),
    ({"shift": 0.5}, "shift is float"),
    ({"scale2": ROW}, "shift2 is None"),
    ({"shift2": ROW}, "scale2 is None"),
    ({"scale2": ROW, "shift2": X}, "shift2 is"),
    ({"scale2": X, "shift2": ROW}, "scale2 is"),
    ({"eps": -1e-6}, "eps is -1e-06"),
    ({"eps": float("nan")}, "eps is nan"),
    ({"backend": "fast"}, "backend is 'fast'"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSALS)])
def test_refuses(bad, message):
    with pytest.raises(ValueError, match=f"layer_norm_modulate: {message}"):
        ops.layer_norm_modulate(**{"x": X, "scale": ROW, "shift": ROW} | bad)
