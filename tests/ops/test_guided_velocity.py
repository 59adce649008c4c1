import pytest
import torch
from ops.exact import check, draw, wide

from fdfo_engine.ops import guided_velocity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (2, 2, 3, 7, 5), (2, 1025)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(shape, dtype, device):
    v, v_uncond, upstream = (draw(*shape, seed=i, dtype=dtype, device=device) for i in range(3))
    v.requires_grad_()
    v_uncond.requires_grad_()
    out = guided_velocity(v, v_uncond, 4.5)
    out.backward(upstream)
    assert out.dtype == dtype
    check(out, wide(v_uncond) + 4.5 * (wide(v) - wide(v_uncond)), "value")
    check(v.grad, 4.5 * wide(upstream), "dv")
    check(v_uncond.grad, -3.5 * wide(upstream), "dv_uncond")


def test_is_computed_in_float32_and_rounded_once():
    v, v_uncond = draw(4096, dtype=torch.bfloat16), draw(4096, seed=1, dtype=torch.bfloat16)
    exact = v_uncond.double() + 4.5 * (v.double() - v_uncond.double())
    once = exact.to(torch.bfloat16)
    assert (guided_velocity(v, v_uncond, 4.5) != once).float().mean() < 0.001


def test_strided_and_repeated():
    v, v_uncond = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (v, v_uncond)]
    assert torch.equal(guided_velocity(*strided, 2.0), guided_velocity(v, v_uncond, 2.0))
    assert torch.equal(guided_velocity(v[1:2], v_uncond[1:2], 2.0), guided_velocity(v, v_uncond, 2.0)[1:2])


def test_without_guidance_it_is_v_itself():
    v = draw(2, 3)
    assert guided_velocity(v, None, 4.5) is v
    assert guided_velocity(v, draw(2, 3, seed=1), 1.0) is v


def test_moves_away_from_the_unconditional_velocity():
    v, v_uncond = draw(8), draw(8, seed=1)
    distance = [(guided_velocity(v, v_uncond, w) - v_uncond).norm() for w in (0.0, 0.5, 2.0, 4.0)]
    assert distance[0] == 0
    assert distance == sorted(distance)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"v": None}, "v is NoneType"),
        ({"v": draw(3).double()}, "v is torch.float64"),
        ({"v_uncond": draw(4)}, "v_uncond is "),
        ({"v_uncond": draw(3).bfloat16()}, "v_uncond is torch.bfloat16"),
        ({"v_uncond": draw(3).to("meta")}, "v_uncond is on meta"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"backend": "triton"}, "backend is 'triton'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refuses(bad, message):
    arguments = {"v": draw(3), "v_uncond": draw(3), "guidance_scale": 2.0} | bad
    with pytest.raises(ValueError, match=f"guided_velocity: {message}"):
        guided_velocity(**arguments)
