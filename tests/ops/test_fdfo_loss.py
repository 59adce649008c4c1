import importlib

import numpy as np
import pytest
import torch
from ops.exact import check, direction, draw, loss, wide

from fdfo_engine import ops

CLIP = 0.03
numpy_warns = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # if interpreted
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (16, 64, 64), (3, 7, 5), (1025,)]
A4 = torch.tensor([0.5, -0.5, 0.25, -0.25])


def inputs(shape=(3, 7, 5), dtype=torch.float32, drift=0.01, device="cpu"):
    """v, v_old and u of 2 pairs: v has drifted a little from v_old."""
    v_old = draw(4, *shape, dtype=dtype, device=device)
    v = (v_old.float() + drift * draw(4, *shape, seed=1, device=device)).to(dtype)
    u = torch.from_numpy(direction(wide(draw(2, 2, *shape, seed=2)))).float().to(device)
    return v.requires_grad_(), v_old, u


@pytest.fixture
def fdfo_loss(backend):
    """The op on one backend, which takes the advantage to the device of v."""

    def fdfo_loss(v, v_old, u, advantage, **settings):
        return ops.fdfo_loss(v, v_old, u, advantage.to(v.device), backend=backend, **settings)

    return fdfo_loss


def signed(u, pair=(0, 0, 1, 1), branch=(0, 1, 0, 1)):
    signs = 1.0 - 2.0 * np.array(branch)
    return wide(u)[list(pair)] * signs.reshape(-1, *[1] * (u.ndim - 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(shape, dtype, device, fdfo_loss):
    v, v_old, u = inputs(shape, dtype, device=device)
    value, log_ratio = fdfo_loss(v, v_old, u, A4, clip_range=CLIP)
    value.backward()
    exact = loss(wide(v), wide(v_old), signed(u), wide(A4), CLIP, 4)
    assert (value.dtype, log_ratio.dtype, v.grad.dtype) == (torch.float32, torch.float32, dtype)
    assert not log_ratio.requires_grad
    for actual, what, name in zip((value, log_ratio, v.grad), exact, ("loss", "log_ratio", "dv"), strict=True):
        check(actual, what, name)


def test_gradient_is_the_slope_of_the_value(fdfo_loss, device):
    """Finite differences of the independent value, so that the closed form is not checked against itself."""
    v, v_old, u = inputs((5,), drift=0.1, device=device)
    fdfo_loss(v, v_old, u, A4, clip_range=CLIP)[0].backward()
    rest = wide(v_old), signed(u), wide(A4), CLIP, 4
    for row, element in ((0, 0), (1, 3), (3, 4)):
        bump = np.zeros(v.shape)
        bump[row, element] = 1e-6
        slope = (loss(wide(v) + bump, *rest)[0] - loss(wide(v) - bump, *rest)[0]) / 2e-6
        assert v.grad[row, element].item() == pytest.approx(slope, rel=1e-5)


def test_log_ratio_is_accurate_where_the_difference_of_means_is_not(fdfo_loss, device):
    """mean(u^2) is about 1 / mean(d^2): the two means cancel in float32, this form does not."""
    v, v_old, u = inputs((4096,), drift=1e-6, device=device)
    u = 30 * u
    got = fdfo_loss(v, v_old, u, A4, clip_range=CLIP)[1]
    exact = loss(wide(v), wide(v_old), signed(u), wide(A4), CLIP, 4)[1]
    assert np.abs(wide(got) - exact).max() < 1e-9


def test_items_pick_their_row_and_branch(fdfo_loss, device):
    v, v_old, u = inputs(device=device)
    pair, branch = [1, 0, 1, 1], torch.tensor([1, 0, 0, 1])
    value, log_ratio = fdfo_loss(v, v_old, u, A4, clip_range=CLIP, pair=pair, branch=branch)
    exact = loss(wide(v), wide(v_old), signed(u, pair, branch.tolist()), wide(A4), CLIP, 4)
    check(value, exact[0], "loss")
    check(log_ratio, exact[1], "log_ratio")


def test_normalizer_makes_micro_batches_add_up(fdfo_loss, device):
    v, v_old, u = inputs(device=device)
    fdfo_loss(v, v_old, u, A4, clip_range=CLIP)[0].backward()
    parts = v.detach().clone().requires_grad_()
    for i in range(4):
        row = slice(i, i + 1)
        items = {"pair": [i // 2], "branch": [i % 2], "normalizer": 4.0}
        fdfo_loss(parts[row], v_old[row], u, A4[row], clip_range=CLIP, **items)[0].backward()
    check(parts.grad, v.grad.double().cpu(), "dv")


def test_upstream_factor_and_a_second_use_of_v(fdfo_loss, device):
    v, v_old, u = inputs(device=device)
    value, _ = fdfo_loss(v, v_old, u, A4, clip_range=CLIP)
    (-3.0 * value + 0.5 * v.square().sum()).backward()
    exact = loss(wide(v), wide(v_old), signed(u), wide(A4), CLIP, 4)[2]
    check(v.grad, -3 * exact + wide(v), "dv")


def test_strided_input_and_mixed_dtypes(fdfo_loss, device):
    v, v_old, u = inputs(device=device)
    strided = [t.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_(t is v) for t in (v, v_old, u)]
    values = []
    for tensors in ((v, v_old, u), strided):
        value, log_ratio = fdfo_loss(*tensors, A4, clip_range=CLIP)
        value.backward()
        values.append((value, log_ratio, tensors[0].grad))
    assert all(map(torch.equal, *values))
    mixed, _ = fdfo_loss(v, v_old.bfloat16(), u, A4.double(), clip_range=CLIP)
    check(mixed, loss(wide(v), wide(v_old.bfloat16()), signed(u), wide(A4), CLIP, 4)[0], "loss")


def test_repeats_bit_for_bit_and_writes_into_no_input(fdfo_loss, device):
    tensors = (*inputs(dtype=torch.bfloat16, device=device), A4)
    before = [t.detach().clone() for t in tensors]
    runs = [fdfo_loss(*tensors, clip_range=CLIP) for _ in range(2)]
    gradients = [torch.autograd.grad(value, tensors[0])[0] for value, _ in runs]
    assert torch.equal(*gradients)
    assert all(map(torch.equal, *runs))
    assert all(map(torch.equal, tensors, before))


def test_on_policy_it_is_zero_and_pulls_by_the_advantage(fdfo_loss, device):
    v, v_old, u = inputs(drift=0.0, device=device)
    value, log_ratio = fdfo_loss(v, v_old, u, A4, clip_range=CLIP)
    value.backward()
    assert value == 0
    assert torch.equal(log_ratio, torch.zeros_like(log_ratio))
    pull = 2 * wide(A4) / (4 * v[0].numel())
    check(v.grad, signed(u) * pull.reshape(-1, 1, 1, 1), "dv")


def test_a_gradient_step_moves_toward_the_better_image(fdfo_loss, device):
    """v = noise - data, so a velocity nearer to v_old - u leads to data nearer to branch 0's."""
    v, v_old, u = inputs(drift=0.0, device=device)
    fdfo_loss(v, v_old, u, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip_range=CLIP)[0].backward()
    moved = wide(v) - 0.01 * wide(v.grad)
    toward_branch_0 = -(moved - wide(v_old)) * signed(u, branch=(0, 0, 0, 0))
    assert (toward_branch_0.reshape(4, -1).sum(1) > 0).all()


def test_the_clip_pulls_back_beyond_its_range(fdfo_loss, device):
    """Along -u the log-ratio grows; past rho = 1 + c the loss of a good branch rises again."""
    _, v_old, u = inputs(drift=0.0, device=device)
    directions = torch.from_numpy(signed(u)).float().to(device)
    scale = (2 * directions.square().flatten(1).mean(1)).view(-1, 1, 1, 1)

    def at(growth):
        v = v_old - growth / scale * directions
        return fdfo_loss(v, v_old, u, torch.ones(4), clip_range=CLIP)[0]

    assert at(0.0) > at(0.01) > at(CLIP)
    assert at(3 * CLIP) > at(CLIP)


def test_rows_without_advantage_get_exactly_nothing(fdfo_loss, device):
    v, v_old, u = inputs(device=device)
    value, _ = fdfo_loss(v, v_old, u, torch.tensor([0.5, 0.0, 0.0, -0.25]), clip_range=CLIP)
    value.backward()
    assert (v.grad[1:3] == 0).all()
    assert (v.grad[[0, 3]] != 0).any()


@numpy_warns
@pytest.mark.parametrize("size", [1e4, 1e18, 3e38])
def test_a_far_off_velocity_is_finite_and_gets_no_gradient(size, fdfo_loss, device):
    v, v_old, u = inputs(device=device)
    with torch.no_grad():
        v.fill_(size)
        v_old.fill_(-size)
    value, log_ratio = fdfo_loss(v, v_old, u, A4, clip_range=CLIP)
    value.backward()
    assert value.item() == pytest.approx((A4.abs() / (2 * CLIP)).mean().item())
    assert (log_ratio < -1e6).all()
    assert (v.grad == 0).all()


@numpy_warns
def test_an_overflowing_ratio_spares_rows_without_advantage(fdfo_loss, device):
    _, v_old, u = inputs(drift=0.0, device=device)
    u = 200 * u  # images that nearly agree: mean(u^2) is in the ten thousands
    v = (v_old - torch.from_numpy(signed(u)).float().to(device)).requires_grad_()
    fdfo_loss(v, v_old, u, torch.zeros(4), clip_range=CLIP)[0].backward()
    assert (v.grad == 0).all()
    value, log_ratio = fdfo_loss(v, v_old, u, A4, clip_range=CLIP)
    assert (log_ratio > 1e4).all()
    assert not torch.isfinite(value)


def test_no_rows(fdfo_loss, device):
    v, u = torch.zeros(0, 3, device=device, requires_grad=True), torch.zeros(0, 3, device=device)
    value, log_ratio = fdfo_loss(v, v, u, torch.zeros(0), clip_range=CLIP, normalizer=8)
    value.backward()
    assert value == 0
    assert (log_ratio.shape, v.grad.shape) == ((0,), (0, 3))
    with pytest.raises(ValueError, match="fdfo_loss: normalizer is None"):
        fdfo_loss(v, v, u, torch.zeros(0), clip_range=CLIP)


ONE = torch.zeros(4, 3)
REFUSALS = [
    ({"v": ONE.double()}, "v is torch.float64"),
    ({"v": ONE[0]}, "v is"),
    ({"v": ONE[:, :0]}, "v is"),
    ({"v_old": ONE[:3]}, "v_old is"),
    ({"v_old": ONE.int()}, "v_old is torch.int32"),
    ({"v_old": ONE.to("meta")}, "v_old is on meta"),
    ({"u": ONE[:2].bfloat16()}, "u is torch.bfloat16"),
    ({"u": ONE[:2, :2]}, "u is"),
    ({"advantage": torch.zeros(3)}, "advantage is"),
    ({"advantage": torch.zeros(4, dtype=torch.int64)}, "advantage is torch.int64"),
    ({"clip_range": 0.0}, "clip_range is 0.0"),
    ({"clip_range": float("nan")}, "clip_range is nan"),
    ({"pair": [0, 0, 1, 1]}, "branch is None"),
    ({"branch": [0, 1, 0, 1]}, "pair is None"),
    ({"pair": [0, 0, 1, 2], "branch": [0, 1, 0, 1]}, "pair is 2"),
    ({"pair": [0, 0, 1], "branch": [0, 1, 0, 1]}, "pair is of length 3"),
    ({"pair": [0, 0, 1, 1], "branch": [0, 1, 0, 2]}, "branch is 2"),
    ({"u": ONE[:1]}, "pair is None"),
    ({"normalizer": 0}, "normalizer is 0.0"),
    ({"normalizer": float("inf")}, "normalizer is inf"),
    ({"backend": "fast"}, "backend is 'fast'"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSALS)])
def test_refuses(bad, message):
    arguments = {"v": ONE, "v_old": ONE, "u": ONE[:2], "advantage": A4, "clip_range": CLIP} | bad
    with pytest.raises(ValueError, match=f"fdfo_loss: {message}"):
        ops.fdfo_loss(**arguments)


def test_one_counter_a_stream_and_not_one_for_every_stream_that_ever_was():
    counter = importlib.import_module("fdfo_engine.ops.fdfo_loss")._stream_ticket
    device = torch.device("cpu")
    assert counter(device, 1) is counter(device, 1)
    assert counter(device, 1) is not counter(device, 2)
    for stream in range(1000):
        assert counter(device, stream).tolist() == [0]
    assert counter.cache_info().currsize <= 100
    counter.cache_clear()
