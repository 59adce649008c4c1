import pytest
import torch
from ops.exact import check, draw, loss, wide
from ops.test_fdfo_loss import DTYPES, SHAPES, inputs, signed

from fdfo_engine import ops

WEIGHTS = torch.tensor([0.7, -1.3, 0.0, 2.5])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient_of_a_weighted_sum(shape, dtype, device, backend):
    v, v_old, u = inputs(shape, dtype, device=device)
    ratio = ops.log_ratio(v, v_old, u, backend=backend)
    (WEIGHTS.to(device) * ratio).sum().backward()
    drift, n = wide(v) - wide(v_old) + signed(u), v[0].numel()
    check(ratio, loss(wide(v), wide(v_old), signed(u), wide(WEIGHTS), 1.0, 1.0)[1], "log_ratio")
    check(v.grad, wide(WEIGHTS).reshape(-1, *[1] * len(shape)) * (-2 / n) * drift, "dv")
    assert (v.grad[2] == 0).all()
    assert (ratio.dtype, v.grad.dtype) == (torch.float32, dtype)


def test_any_loss_of_it_has_the_gradient_of_fdfo_loss(device, backend):
    """FDFO's own surrogate, written with torch on top of the log-ratio."""
    v, v_old, u = inputs(drift=0.1, device=device)
    advantage, clip = torch.tensor([0.5, -0.5, 0.25, -0.25], device=device), 0.03
    rho = ops.log_ratio(v, v_old, u, backend=backend).double().exp()
    surrogate = -advantage * rho + advantage.abs() / (2 * clip) * (rho - 1).square()
    surrogate.mean().backward()
    check(v.grad, loss(wide(v), wide(v_old), signed(u), wide(advantage), clip, 4)[2], "dv")


def test_items_pick_their_row_and_branch_and_repeat(device, backend):
    v, v_old, u = inputs(device=device)
    items = {"pair": [1, 0, 1, 1], "branch": [1, 0, 0, 1]}
    found = [ops.log_ratio(v, v_old, u, **items, backend=backend) for _ in range(2)]
    exact = loss(wide(v), wide(v_old), signed(u, **items), wide(WEIGHTS), 1.0, 1.0)[1]
    check(found[0], exact, "log_ratio")
    gradients = [torch.autograd.grad(ratio.sum(), v)[0] for ratio in found]
    assert torch.equal(*found)
    assert torch.equal(*gradients)


def test_strided_input(device, backend):
    v, v_old, u = (draw(n, 6, 5, seed=n, device=device).transpose(1, 2) for n in (4, 4, 2))
    check(
        ops.log_ratio(v, v_old, u, backend=backend),
        loss(wide(v), wide(v_old), signed(u), wide(WEIGHTS), 1.0, 1.0)[1],
        "log_ratio",
    )


def test_no_rows(device, backend):
    v, u = torch.zeros(0, 3, device=device, requires_grad=True), torch.zeros(0, 3, device=device)
    ratio = ops.log_ratio(v, v, u, backend=backend)
    ratio.sum().backward()
    assert (ratio.shape, v.grad.shape) == ((0,), (0, 3))


ONE = torch.zeros(4, 3)
REFUSALS = [
    ({"v": ONE.double()}, "v is torch.float64"),
    ({"v_old": ONE[:3]}, "v_old is"),
    ({"u": ONE[:2, :2]}, "u is"),
    ({"pair": [0, 0, 1, 1]}, "branch is None"),
    ({"pair": [0, 0, 1, 2], "branch": [0, 1, 0, 1]}, "pair is 2"),
    ({"backend": "fast"}, "backend is 'fast'"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refuses(bad, message):
    with pytest.raises(ValueError, match=f"log_ratio: {message}"):
        ops.log_ratio(**({"v": ONE, "v_old": ONE, "u": ONE[:2]} | bad))
