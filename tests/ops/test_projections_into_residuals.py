"""Projections whose outputs join their residual streams, against float64 by the formula."""

from dataclasses import replace

import pytest
import torch
from numerics import assert_as_good_as, assert_gradients_as_good_as
from ops.exact import draw
from ops.test_adapted_projection import DTYPES, SCALING, described, inputs
from torch.nn import functional

from fdfo_engine import ops
from fdfo_engine.ops import IntoResidual


def residual_case(dtype, device, sizes=((66, 4), (9, 3)), *, N=40):
    """One x, longer than its streams, a layer and a rank each, and residuals in wider rows with gates of wider rows."""
    layers = [list(inputs((1,), 24, N, r, dtype=dtype, device=device, seed=n).values())[1:] for n, r in sizes]
    x = draw(2, sum(n for n, _ in sizes) + 2, 24, seed=90, dtype=dtype, device=device)
    residuals = [
        (draw(2, n + 1, N, seed=91 + n, dtype=dtype, device=device)[:, 1:],
         draw(2, 3 * N, seed=92 + n, dtype=dtype, device=device)[:, N : 2 * N])
        for n, _ in sizes
    ]  # fmt: skip
    return x, layers, residuals


def project_into(x, layers, residuals, backend=None):
    """The sums, by the op."""
    projections = [
        [replace(described(*layer), end=IntoResidual(*residual))]
        for layer, residual in zip(layers, residuals, strict=True)
    ]
    tokens = [residual.shape[1] if residual.ndim == 3 else 0 for residual, _ in residuals]
    found = ops.adapted_projections(x, projections, tokens=tokens, backend=backend).residuals
    return [residual.joined(backend=backend) for residual in found]


def residual_sums(x, layers, residuals, dtype):
    """By torch, every step rounded to `dtype`."""
    first, found = 0, []
    for (w, b, a, c), (residual, gate) in zip(layers, residuals, strict=True):
        part = x[:, first : first + residual.shape[1]].to(dtype)
        first += residual.shape[1]
        y = functional.linear(part, w.to(dtype), b.to(dtype))
        if a is not None:
            y = y + SCALING * (part @ a.to(dtype).T) @ c.to(dtype).T
        found.append(residual.to(dtype) + gate.to(dtype)[:, None] * y)
    return found


@torch.no_grad()
@pytest.mark.parametrize("adapted", [(0, 1), (0,), (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residuals(dtype, adapted, backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, layers, residuals = residual_case(dtype, device)
    layers = [[*layer[:2], *(layer[2:] if i in adapted else (None, None))] for i, layer in enumerate(layers)]
    found = project_into(x, layers, residuals, backend)
    want = residual_sums(x.double(), layers, residuals, torch.float64)
    for y, plain, exact_y in zip(found, residual_sums(x, layers, residuals, dtype), want, strict=True):
        assert (y.dtype, y.is_contiguous()) == (dtype, True)
        assert_as_good_as(y, plain, exact_y, name="sum")
    assert all(map(torch.equal, found, project_into(x, layers, residuals, backend)))
    closed = [(r, torch.zeros_like(gate)) for r, gate in residuals]
    for y, (r, _) in zip(project_into(x, layers, closed, backend), closed, strict=True):
        assert torch.equal(y, r)


def test_residuals_are_refused_where_they_do_not_fit():
    x, layers, residuals = residual_case(torch.float32, "cpu")
    (r, gate), other = residuals
    for bad, message in (
        ((r[..., :3], gate), r"projections\[0\]\[0\].end.residual is"),
        ((r.double(), gate), r"projections\[0\]\[0\].end.residual is torch.float64"),
        ((r, gate[:1]), r"projections\[0\]\[0\].end.gate is"), ((r[0], gate), "tokens is"),
    ):  # fmt: skip
        with torch.no_grad(), pytest.raises(ValueError, match=f"adapted_projections: {message}"):
            project_into(x, layers, [bad, other])


def leaves_of(x, layers, residuals, dtype=None):
    """Copies that want gradients, in `dtype` if given, and all of them in a row."""

    def copy(t):
        return t if t is None else t.detach().to(t.dtype if dtype is None else dtype).clone().requires_grad_()

    x, layers, residuals = copy(x), [[copy(t) for t in n] for n in layers], [[copy(t) for t in r] for r in residuals]
    flat = [x, *(t for n in layers for t in n if t is not None), *(t for r in residuals for t in r)]
    return x, layers, residuals, flat


@pytest.mark.parametrize(
    ("adapted", "used"), [((0, 1), (0, 1)), ((0, 1), (1,)), ((0,), (0, 1)), ((1,), (0,)), ((), (1,))], ids=str
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_residual_gradients(dtype, adapted, used, backend, device):
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, layers, residuals = residual_case(dtype, device)
    layers = [[*layer[:2], *(layer[2:] if i in adapted else (None, None))] for i, layer in enumerate(layers)]
    upstream = [draw(*r.shape, seed=80 + i, dtype=dtype, device=device) for i, (r, _) in enumerate(residuals)]

    def gradients(run, dtype=None):
        *given, flat = leaves_of(x, layers, residuals, dtype)
        outs = run(*given)
        wanted = [upstream[i].to(outs[i].dtype) for i in used]
        return torch.autograd.grad([outs[i] for i in used], flat, wanted, allow_unused=True)

    found, again = (gradients(lambda x, n, r: project_into(x, n, r, backend)) for _ in range(2))
    true = gradients(lambda x, n, r: residual_sums(x, n, r, torch.float64), torch.float64)
    plain = gradients(lambda x, n, r: residual_sums(x, n, r, dtype), dtype)
    assert_gradients_as_good_as(found, again, plain, true, floor=3e-6)


def test_only_what_is_asked_for(backend, device):
    """A frozen layer and gate: x and residual get the same gradients, and nothing is kept that these do not need."""
    if backend not in ops.implementations()["adapted_projections"]:
        pytest.skip(f"not written in {backend}")
    x, layers, residuals = residual_case(torch.float32, device)
    whole = leaves_of(x, layers, residuals)
    upstream = [torch.ones_like(r) for r, _ in residuals]
    outs = project_into(*whole[:3], backend)
    want = torch.autograd.grad(outs, [whole[0], *(r for r, _ in whole[2])], upstream)
    x, added = x.detach().requires_grad_(), [(r.detach().requires_grad_(), gate) for r, gate in residuals]
    layers = [[t.detach() for t in n] for n in layers]
    outs = project_into(x, layers, added, backend)
    found = torch.autograd.grad(outs, [x, *(r for r, _ in added)], upstream)
    assert all(map(torch.equal, found, want))
