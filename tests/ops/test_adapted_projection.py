import pytest
import torch
from numerics import assert_as_good_as
from ops.exact import draw
from torch.nn import functional

from fdfo_engine import ops
from fdfo_engine.ops import Adapter, Gelu, HeadNorm, Projection, _projection_torch
from fdfo_engine.ops.adapted_projections import adapted_projection_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "bias", "lora_a", "lora_b")
SCALING = 0.75
# rows, K, N, r: one element; less than a block; one past the blocks of a kernel; where W + sBA is not formed
SHAPES = [((1,), 1, 1, 1), ((2, 3), 7, 5, 3), ((65,), 65, 129, 17), ((3,), 96, 80, 8)]


def inputs(lead=(2, 3), K=7, N=5, r=3, dtype=torch.float32, device="cpu", seed=0):
    shapes = ((*lead, K), (N, K), (N,), (r, K), (N, r))
    scales = (1.0, K**-0.5, 1.0, K**-0.5, r**-0.5)
    found = {}
    for i, (name, shape, scale) in enumerate(zip(NAMES, shapes, scales, strict=True)):
        kind = torch.float32 if name.startswith("lora") else dtype
        found[name] = (scale * draw(*shape, seed=seed + i)).to(device, kind).requires_grad_()
    return found


def exact(arguments, upstream, gelu=False):
    """Value and gradients in float64."""
    leaves = [t.detach().double().requires_grad_() for t in arguments.values()]
    x, weight, bias, a, b = leaves
    y = functional.linear(x, weight, bias) + SCALING * (x @ a.T) @ b.T
    y = functional.gelu(y, approximate="tanh") if gelu else y
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.double())]


def plain(arguments, upstream, gelu=False):
    """What PEFT computes under mixed precision: everything in the dtype of x, gradients rounded on their way."""
    x, weight, bias, a, b = arguments.values()
    y = functional.linear(x, weight, bias)
    y = y + SCALING * functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
    y = functional.gelu(y, approximate="tanh") if gelu else y
    return [y, *torch.autograd.grad(y, arguments.values(), upstream)]


def described(weight, bias, lora_a, lora_b, *, scaling=SCALING, gelu=False):
    """A projection of these tensors; without factors it has no adapter."""
    adapter = None if lora_a is None and lora_b is None else Adapter(lora_a, lora_b, scaling)
    return Projection(weight, bias, adapter, Gelu() if gelu else None)


@pytest.fixture
def project(backend):
    if backend not in ops.implementations()["adapted_projection"]:
        pytest.skip(f"not written in {backend}")

    def project(x, *parts, gelu=False):
        return ops.adapted_projection(x, described(*parts, gelu=gelu), backend=backend)

    return project


def run(project, arguments, upstream, **settings):
    y = project(*arguments.values(), **settings)
    return [y, *torch.autograd.grad(y, list(arguments.values()), upstream)]


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(shape, dtype, gelu, device, project):
    arguments = inputs(*shape, dtype=dtype, device=device)
    upstream = draw(*shape[0], shape[2], seed=9, dtype=dtype, device=device)
    found, want = run(project, arguments, upstream, gelu=gelu), exact(arguments, upstream, gelu)
    for name, actual, other, value in zip(("y", *NAMES), found, plain(arguments, upstream, gelu), want, strict=True):
        assert actual.dtype == (torch.float32 if name.startswith("lora") else dtype)
        assert actual.shape == value.shape
        assert_as_good_as(actual, other, value, name=name, floor=floor(shape, dtype))


def floor(shape, dtype):
    """On one element, roundings of operands don't average out, and the plain code's may cancel by chance."""
    return torch.finfo(dtype).eps if dtype != torch.float32 and shape == SHAPES[0] else 1e-6


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
def test_the_reference_is_the_formula(gelu):
    arguments = inputs()
    x, *parts = arguments.values()
    upstream = draw(2, 3, 5, seed=9)
    y = adapted_projection_reference(x, described(*parts, gelu=gelu))
    found = [y, *torch.autograd.grad(y, list(arguments.values()), upstream)]
    for name, actual, value in zip(("y", *NAMES), found, exact(arguments, upstream, gelu), strict=True):
        assert_as_good_as(actual, value, value, name=name)


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
def test_without_adapter_or_bias(gelu, device, project):
    arguments = inputs(device=device)
    x, weight, bias, a, b = arguments.values()
    want = functional.linear(x, weight, bias)
    want = functional.gelu(want, approximate="tanh") if gelu else want
    assert_as_good_as(project(x, weight, bias, None, None, gelu=gelu), want, want, name="y")
    y = project(x, weight, None, a, b)
    want = functional.linear(x, weight) + SCALING * (x @ a.T) @ b.T
    assert_as_good_as(y, want, want, name="y")
    got = torch.autograd.grad(y.sum(), (x, a))
    for name, actual, value in zip("xa", got, torch.autograd.grad(want.sum(), (x, a)), strict=True):
        assert_as_good_as(actual, value, value, name=name)


def test_an_adapter_at_its_start_changes_nothing(device, project):
    x, weight, bias, a, b = inputs((70,), 24, 20, 4, device=device).values()
    got = project(x, weight, bias, a, torch.zeros_like(b))
    assert torch.equal(got, project(x, weight, bias, 5 - 3 * a, torch.zeros_like(b)))
    assert not torch.equal(got, project(x, weight, bias, a, b))
    want = functional.linear(x.double(), weight.double(), bias.double())
    assert_as_good_as(got, functional.linear(x, weight, bias), want, name="y")


@pytest.mark.parametrize("trained", [("x",), ("lora_a", "lora_b"), ("lora_b",), ("weight", "bias"), ("bias",)], ids=str)
def test_only_what_is_trained_gets_a_gradient(trained, device, project):
    arguments = {name: t.detach().requires_grad_(name in trained) for name, t in inputs(device=device).items()}
    project(*arguments.values(), gelu=True).sum().backward()
    want = exact(inputs(device=device), torch.ones(2, 3, 5, device=device), gelu=True)[1:]
    for (name, t), value in zip(arguments.items(), want, strict=True):
        assert (t.grad is not None) == (name in trained)
        if t.grad is not None:
            assert_as_good_as(t.grad, value, value, name=name)


@pytest.mark.parametrize("rank", [2, 24, 70])
def test_gradients_of_the_factors_beside_a_frozen_weight(rank, device, project):
    """By g^T x where that is less work, by thin products else; on a GPU in one or two blocks of the rank."""
    arguments = inputs((70,), 24, 20, rank, device=device)
    upstream = draw(70, 20, device=device)
    factors = arguments["lora_a"], arguments["lora_b"]
    y = project(arguments["x"], arguments["weight"].detach(), None, *factors)
    found = torch.autograd.grad(y, (arguments["x"], *factors), upstream)
    want, other = exact(arguments, upstream), plain(arguments, upstream)
    for name, actual, i in zip(("x", "lora_a", "lora_b"), found, (1, 4, 5), strict=True):
        assert_as_good_as(actual, other[i], want[i], name=name)


def test_saves_no_copy_of_a_weight_and_not_x_where_nobody_needs_it(device, project):
    x, weight, bias, a, b = (t.detach() for t in inputs((2, 35), 24, 20, 4, device=device).values())
    for parts in ((weight, bias, a, b), (weight, bias, None, None)):
        y = project(x.requires_grad_(), *parts)
        saved = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
        assert saved <= {t.data_ptr() for t in parts if t is not None}


def test_strided_input(device, project):
    arguments = inputs((4, 5), 16, 12, 4, device=device)
    strided = {}
    for name, t in arguments.items():
        strided[name] = t.detach().clone().T.contiguous().T if t.ndim == 2 else t.detach()
    wide = torch.zeros(4, 5, 32, device=device)
    wide[..., 8:24] = arguments["x"].detach()
    strided["x"] = wide[..., 8:24]
    for t in strided.values():
        t.requires_grad_()
    upstream = draw(12, 5, 4, device=device).permute(2, 1, 0)
    found = [run(project, tensors, g) for tensors, g in ((arguments, upstream.contiguous()), (strided, upstream))]
    for name, actual, value in zip(("y", *NAMES), *reversed(found), strict=True):
        assert_as_good_as(actual, value, value, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit_and_writes_into_no_input(dtype, device, project):
    arguments = inputs((67,), 40, 24, 5, dtype=dtype, device=device)
    upstream = draw(67, 24, dtype=dtype, device=device)
    before = [t.detach().clone() for t in (*arguments.values(), upstream)]
    runs = [run(project, arguments, upstream, gelu=True) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    assert all(map(torch.equal, (*arguments.values(), upstream), before))


def test_the_same_without_gradients(device, project):
    arguments = inputs((9,), 16, 12, 4, device=device)
    with torch.no_grad():
        quiet = project(*arguments.values(), gelu=True)
    assert not quiet.requires_grad
    assert torch.equal(quiet, project(*arguments.values(), gelu=True))


def test_no_rows(device, project):
    arguments = inputs((0,), device=device)
    for settings in ({}, {"gelu": True}):
        y, dx, *rest = run(project, arguments, torch.zeros(0, 5, device=device), **settings)
        assert (y.shape, dx.shape) == ((0, 5), (0, 7))
        assert all((g == 0).all() for g in rest)


def test_a_step_down_the_gradient_lowers_the_error(device, project):
    """The adapter alone, trained to a layer of low rank beside its own."""
    x, weight, bias, a, b = (t.detach() for t in inputs((64,), 12, 10, 3, device=device).values())
    target = functional.linear(x, weight, bias) + 0.5 * (x @ a.T) @ b.T
    factors = [a.clone().requires_grad_(), torch.zeros_like(b).requires_grad_()]
    optimizer, errors = torch.optim.SGD(factors, lr=0.3), []
    for _ in range(20):
        optimizer.zero_grad()
        error = (project(x, weight, bias, *factors) - target).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]


def group_of(rows, dtype, device):
    """Layers of one x with different sizes and ranks, one of them without an adapter."""
    sizes = ((12, 4), (20, 3), (8, 4), (6, 2))
    several = [inputs((rows,), 16, n, r, dtype=dtype, device=device, seed=n) for n, r in sizes]
    layers = [[one[name] for name in NAMES[1:]] for one in several]
    layers[2][2:] = None, None
    return several[0]["x"], layers


def gradients(ys, x, layers, upstream):
    """By the first three layers: the last one's output is not used."""
    leaves = [x, *(t for layer in layers for t in layer if t is not None)]
    return torch.autograd.grad(ys[:3], leaves, upstream, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 66])
def test_a_group_is_its_layers(rows, dtype, backend, device):
    if backend not in ops.implementations()["adapted_projection"]:
        pytest.skip(f"not written in {backend}")
    x, layers = group_of(rows, dtype, device)
    upstream = [draw(rows, len(layer[0]), seed=i, dtype=dtype, device=device) for i, layer in enumerate(layers[:3])]
    projections = [described(*layer) for layer in layers]
    ((*together,),) = ops.adapted_projections(x[None], [projections], backend=backend).streams
    together = [y[0] for y in together]
    apart = [ops.adapted_projection(x, projection, backend=backend) for projection in projections]
    found, other = ([*ys, *gradients(ys, x, layers, upstream)] for ys in (together, apart))
    wide = x.detach().double().requires_grad_()
    wide_layers = [[None if t is None else t.detach().double().requires_grad_() for t in layer] for layer in layers]
    exact_y = [
        functional.linear(wide, w, b) + (0 if a is None else SCALING * (wide @ a.T) @ c.T) for w, b, a, c in wide_layers
    ]
    exact_gradients = gradients(exact_y, wide, wide_layers, [g.double() for g in upstream])
    for one, plain, value in zip(found, other, [*exact_y, *exact_gradients], strict=True):
        assert (one is None) == (value is None)
        if one is not None:
            assert_as_good_as(one, plain, value, name="output or gradient")


def test_a_merged_weight_is_made_where_it_is_less_work():
    few, many = inputs((3,), 96, 80, 8), inputs((70,), 96, 80, 8)
    for arguments, merges in ((few, False), (many, True)):
        x, *parts = arguments.values()
        assert _projection_torch.merges(x, [described(*parts)]) == merges
        assert not _projection_torch.merges(x.bfloat16(), [described(*parts)])


GOOD = {name: t.detach() for name, t in inputs().items()}
REFUSALS = [
    ({"x": GOOD["x"].double()}, "x is torch.float64"),
    ({"x": GOOD["x"][..., :0]}, "x is"),
    ({"x": None}, "x is NoneType"),
    ({"weight": GOOD["weight"].bfloat16()}, "weight is torch.bfloat16"),
    ({"weight": GOOD["weight"][:, :3]}, "weight is"),
    ({"weight": GOOD["weight"].to("meta")}, "weight is on meta"),
    ({"bias": GOOD["bias"][:2]}, "bias is"),
    ({"bias": GOOD["bias"].half()}, "bias is torch.float16"),
    ({"lora_a": None}, "adapter.a is NoneType"),
    ({"lora_b": None}, "adapter.b is NoneType"),
    ({"lora_a": GOOD["lora_a"].bfloat16()}, "adapter.a is torch.bfloat16"),
    ({"lora_a": GOOD["lora_a"][:, :2]}, "adapter.a is"),
    ({"lora_b": GOOD["lora_b"][:, :2]}, "adapter.b is"),
    ({"lora_b": GOOD["lora_b"].half()}, "adapter.b is torch.float16"),
    ({"scaling": float("nan")}, "adapter.scale is nan"),
    ({"backend": "fast"}, "backend is 'fast'"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSALS)])
def test_refuses(bad, message):
    given = GOOD | {"backend": None} | bad
    x, backend = given.pop("x"), given.pop("backend")
    with pytest.raises(ValueError, match=f"adapted_projection: {message}"):
        ops.adapted_projection(x, described(**given), backend=backend)


def test_refuses_what_is_no_projection_and_ends_of_several():
    good = [GOOD[name] for name in NAMES[1:]]
    with pytest.raises(ValueError, match="adapted_projection: projection is tuple; it takes a Projection"):
        ops.adapted_projection(GOOD["x"], tuple(good))
    ended = Projection(*good[:2], end=HeadNorm(None, 5))
    with pytest.raises(ValueError, match="adapted_projection: end is HeadNorm; it takes None or Gelu"):
        ops.adapted_projection(GOOD["x"], ended)
    for bad, message in (
        ({"end": "gelu"}, "end is a str; it takes None or one of Gelu, IntoResidual, HeadNorm, Packed"),
        ({"adapter": (GOOD["lora_a"], GOOD["lora_b"])}, "adapter is a tuple; it takes an Adapter or None"),
        ({"adapter": Adapter(GOOD["lora_a"], GOOD["lora_b"], "2")}, "adapter.scale is '2'; it takes a finite number"),
    ):
        with pytest.raises(ValueError, match=f"adapted_projection: {message}"):
            ops.adapted_projection(GOOD["x"], Projection(*good[:2], **bad))
    with pytest.raises(ValueError, match=r"adapted_projections: projections\[0\] is a Projection; it takes a list"):
        ops.adapted_projections(GOOD["x"], [Projection(*good[:2])])
    with pytest.raises(ValueError, match=r"adapted_projections: projections is of lengths \[0\]"):
        ops.adapted_projections(GOOD["x"], [[]])
