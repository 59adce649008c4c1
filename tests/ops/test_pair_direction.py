import functools

import pytest
import torch
from ops.exact import check, direction, draw, wide

from fdfo_engine import ops


@pytest.fixture
def pair_direction(backend):
    """The op on one backend."""
    return functools.partial(ops.pair_direction, backend=backend)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("shape", [(1,), (16, 64, 64), (3, 7, 5), (1025,)], ids=str)
def test_value(shape, scale, device, pair_direction):
    x = scale * draw(3, 2, *shape, device=device)
    check(pair_direction(x), direction(wide(x)), "u")


def test_strided_and_in_place(pair_direction, device):
    x = draw(3, 2, 4, 5, 6, device=device)
    expected = pair_direction(x)
    strided = x.transpose(1, 4).contiguous().transpose(1, 4)
    assert torch.equal(pair_direction(strided), expected)
    second = x[:, 1].clone()
    u = pair_direction(x, inplace=True)
    assert u.data_ptr() == x.data_ptr()
    assert torch.equal(u, expected)
    assert torch.equal(x[:, 0], expected)
    assert torch.equal(x[:, 1], second)


def test_repeats_and_never_depends_on_the_batch(pair_direction, device):
    x = draw(5, 2, 16, 33, 31, device=device)
    whole = pair_direction(x)
    assert torch.equal(pair_direction(x), whole)
    for i in range(5):
        assert torch.equal(pair_direction(x[i : i + 1])[0], whole[i])


def test_equal_branches_have_no_direction(pair_direction, device):
    x = draw(2, 1, 3, 4, device=device).expand(2, 2, 3, 4)
    assert (pair_direction(x) == 0).all()


def test_swapping_the_branches_turns_it_round(pair_direction, device):
    x = draw(2, 2, 3, 4, device=device)
    assert torch.equal(pair_direction(x.flip(1)), -pair_direction(x))


def test_points_from_the_mean_to_branch_0_and_grows_as_images_come_closer(pair_direction, device):
    x = draw(2, 2, 64, device=device)
    near = x.mean(1, keepdim=True) + 0.1 * (x - x.mean(1, keepdim=True))
    far_u, near_u = pair_direction(x), pair_direction(near)
    assert ((x[:, 0] - x.mean(1)) * far_u).sum(1).min() > 0
    assert torch.allclose(near_u, 10 * far_u, rtol=1e-3)


def test_no_pairs(pair_direction, device):
    assert pair_direction(torch.zeros(0, 2, 3, 4, device=device)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "x is NoneType"),
        (torch.zeros(2, 2, 3).bfloat16(), "x is torch.bfloat16"),
        (torch.zeros(2, 2), "x is .*branch axis"),
        (torch.zeros(4, 3, 5), "x is .*branch axis"),
        (torch.zeros(2, 2, 0), "x is .*at least one element"),
    ],
    ids=["type", "dtype", "latent", "branch", "empty"],
)
def test_refuses(x, message):
    with pytest.raises(ValueError, match=f"pair_direction: {message}"):
        ops.pair_direction(x)
    with pytest.raises(ValueError, match="pair_direction: backend is 'fast'"):
        ops.pair_direction(torch.zeros(1, 2, 3), backend="fast")


def test_refuses_to_write_where_pairs_share_memory(pair_direction, device):
    shared = draw(1, 2, 4, 5, device=device).expand(3, 2, 4, 5)
    assert torch.equal(pair_direction(shared)[0], pair_direction(shared)[2])
    with pytest.raises(
        ValueError, match=r"x is of shape \[3, 2, 4, 5\] with strides \[0, 20, 5, 1\], so that elements"
    ):
        pair_direction(shared, inplace=True)
