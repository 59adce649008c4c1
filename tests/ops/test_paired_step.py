import numpy as np
import pytest
import torch
from ops.exact import check, draw, noise, step, wide

from fdfo_engine.ops import churn_stream, guided_velocity, paired_noise, paired_step

PAIRS, SEED, STEP = [3, 2**33 + 1, 0], 2**40 + 9, 4
T, S = 0.75, 0.625
GAMMA = torch.tensor([0.25, 0.0, 1.5], dtype=torch.float64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LATENT = (2, 3, 5)


def inputs(shape=LATENT, dtype=torch.float32, device="cpu"):
    return [draw(3, 2, *shape, seed=i, dtype=d, device=device) for i, d in enumerate((torch.float32, dtype, dtype))]


SETTINGS = {"sigma": T, "sigma_next": S, "gamma": GAMMA, "seed": SEED, "pair_ids": PAIRS, "step": STEP}


@pytest.fixture
def advance(backend):
    """`paired_step` of one backend, with the settings above unless said otherwise."""

    def advance(x, v, **other):
        return paired_step(x, v, **(SETTINGS | {"backend": backend} | other))

    return advance


def expected(x, velocity, gamma=GAMMA, index=STEP):
    rows = []
    for p, (pair, g) in enumerate(zip(PAIRS, gamma.tolist(), strict=True)):
        for k in (0, 1):
            eps = noise(x.shape[2:], seed=SEED, pair=pair, stream=3 + 2 * index + k)
            rows.append(step(wide(x)[p, k], wide(velocity)[p, k], t=T, s=S, gamma=g, eps=eps))
    return np.array(rows).reshape(x.shape)


@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (1025,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value(shape, dtype, device, advance):
    x, v, v_uncond = inputs(shape, dtype, device)
    check(advance(x, v), expected(x, v), "x_next")
    used = torch.empty_like(v)
    x_next = advance(x, v, v_uncond=v_uncond, guidance_scale=3.5, v_out=used)
    assert torch.equal(used, guided_velocity(v, v_uncond, 3.5))
    check(x_next, expected(x, used), "x_next with guidance")


def test_antithetic_branches_take_one_noise_with_opposite_signs(device, advance):
    x, v, _ = inputs(device=device)
    exact = []
    for p, (pair, g) in enumerate(zip(PAIRS, GAMMA.tolist(), strict=True)):
        eps = noise(LATENT, seed=SEED, pair=pair, stream=3 + 2 * STEP)
        signed = (eps, -eps)
        exact.append([step(wide(x)[p, k], wide(v)[p, k], t=T, s=S, gamma=g, eps=signed[k]) for k in (0, 1)])
    check(advance(x, v, solver="antithetic"), np.array(exact), "x_next")


def test_without_churn_it_is_euler_to_the_bit_and_draws_no_noise(monkeypatch, device, advance):
    x, v, _ = (t.repeat(1, 1, 8, 1, 1)[:1] for t in inputs((2, 64, 64), torch.bfloat16, device))  # a real latent

    def forbidden(*_, **__):
        raise AssertionError("noise without churn")

    monkeypatch.setattr("fdfo_engine.ops._trajectory.philox_normal", forbidden)
    euler = x + (S - T) * v.float()
    assert torch.equal(advance(x, v, gamma=0.0, pair_ids=[7]), euler)
    assert torch.equal(advance(x, v, gamma=torch.zeros(1), pair_ids=[7]), euler)


def test_the_last_step_takes_no_noise_whatever_its_churn(advance, device):
    x, v, _ = inputs(device=device)
    assert torch.equal(advance(x, v, sigma_next=0.0, gamma=0.5), x - T * v)


def test_strided_inputs_and_outputs(advance, device):
    x, v, v_uncond = inputs(dtype=torch.bfloat16, device=device)
    strided = [t.transpose(2, 4).contiguous().transpose(2, 4) for t in (x, v, v_uncond)]
    table = torch.empty(3, 2, 7, *LATENT, dtype=torch.bfloat16, device=device)
    arguments = {"guidance_scale": 2.0, "v_out": table[:, :, 3]}
    expected_ = advance(x, v, v_uncond=v_uncond, guidance_scale=2.0)
    assert torch.equal(advance(*strided[:2], v_uncond=strided[2], **arguments), expected_)
    assert torch.equal(table[:, :, 3], guided_velocity(v, v_uncond, 2.0))
    assert table[:, :, [0, 1, 2, 4, 5, 6]].isnan().all()
    in_place = strided[0]
    assert advance(in_place, v, v_uncond=v_uncond, guidance_scale=2.0, inplace=True) is in_place
    assert torch.equal(in_place, expected_)


def test_writes_into_no_input_unasked(advance, device):
    tensors = inputs(device=device)
    before = [t.clone() for t in tensors]
    advance(*tensors[:2], v_uncond=tensors[2], guidance_scale=2.0)
    assert all(map(torch.equal, tensors, before))


def test_repeats_and_never_depends_on_the_batch(advance, device):
    x, v, _ = inputs(device=device)
    whole = advance(x, v)
    assert torch.equal(advance(x, v), whole)
    for i in range(3):
        alone = advance(x[i : i + 1], v[i : i + 1], gamma=float(GAMMA[i]), pair_ids=PAIRS[i : i + 1])
        assert torch.equal(alone[0], whole[i])
    reversed_ = advance(x.flip(0), v.flip(0), gamma=GAMMA.flip(0), pair_ids=torch.tensor(PAIRS[::-1]))
    assert torch.equal(reversed_, whole.flip(0))


def test_one_number_and_one_a_pair_give_the_same_bits(advance, device):
    x, v, _ = inputs(device=device)
    assert torch.equal(advance(x, v, gamma=0.1), advance(x, v, gamma=torch.full((3,), 0.1, dtype=torch.float64)))


@pytest.mark.parametrize("gamma", [0.05, 0.8])
def test_noise_levels_stay_on_the_grid(gamma, backend, device):
    """With the exact velocity of data 0, x_t = t * noise: after a step its deviation is s, with churn or without."""
    n = paired_noise([1, 2], (2**15,), seed=1, gamma=0.0, device=device, backend=backend)
    where = {"pair_ids": [1, 2], "step": 0, "backend": backend}
    x = paired_step(T * n, n, sigma=T, sigma_next=S, gamma=gamma, seed=1, **where)
    assert (x.flatten(1).std(1) / S - 1).abs().max() < 0.02
    assert (x[:, 0] - x[:, 1]).abs().max() > 0.1


def test_streams_are_those_of_the_grid_point():
    assert [churn_stream(STEP + 1, k) for k in (0, 1)] == [3 + 2 * STEP, 4 + 2 * STEP]


def test_no_pairs(advance, device):
    x, v, _ = (t[:0] for t in inputs(device=device))
    assert advance(x, v, gamma=0.1, pair_ids=[]).shape == x.shape


X, V, _ = inputs()
REFUSALS = [
    ({"x": X.bfloat16()}, "x is torch.bfloat16"),
    ({"x": X[:, 0]}, r"x is \[3, 2, 3, 5\]; it takes|v is "),
    ({"x": X.flatten(0, 1)}, r"x is \[6, 2, 3, 5\]|v is "),
    ({"x": X[:, :1]}, r"x is \[3, 1, 2, 3, 5\].*branch axis"),
    ({"x": X[..., :0], "v": V[..., :0]}, "x is .*at least one element"),
    ({"v": V[:2]}, "v is "),
    ({"v": V.double()}, "v is torch.float64"),
    ({"v": V.to("meta")}, "v is on meta; it takes tensors on one device, here cpu"),
    ({"v_uncond": V.bfloat16()}, "v_uncond is torch.bfloat16"),
    ({"v_uncond": V[:, :1]}, "v_uncond is"),
    ({"v_out": V.bfloat16()}, "v_out is torch.bfloat16"),
    ({"v_out": V[:1]}, "v_out is"),
    ({"v_out": V[:1].expand_as(V)}, r"v_out is of shape \[3, 2, 2, 3, 5\] with strides \[0, .*elements share memory"),
    ({"v_out": torch.empty(128).as_strided(V.shape, (30, 15, 2, 5, 1))}, "v_out is of shape .*elements share memory"),
    ({"x": X[:, :1].expand_as(X), "inplace": True}, "x is of shape .*; it takes a tensor with memory for each element"),
    ({"sigma": S, "sigma_next": T}, "sigma_next is 0.75 after sigma = 0.625"),
    ({"sigma_next": T}, "sigma_next is"),
    ({"sigma_next": -0.1}, "sigma_next is"),
    ({"sigma": float("nan")}, "sigma is nan"),
    ({"gamma": -0.1}, "gamma is"),
    ({"gamma": torch.tensor([0.1, float("nan"), 0.1])}, "gamma is"),
    ({"gamma": torch.zeros(2)}, r"gamma is \[2\]"),
    ({"seed": 2**64}, "seed is"),
    ({"pair_ids": PAIRS[:2]}, "pair_ids is of length 2; it takes length 3"),
    ({"pair_ids": torch.tensor([1, 2, -3])}, "pair_ids is -3"),
    ({"step": -1}, "step is -1"),
    ({"step": 1.0}, "step is 1.0"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
    ({"backend": "fast"}, "backend is 'fast': no such backend"),
    ({"x": torch.empty(1, device="meta").expand(1, 2, 2**34 + 1)}, "x is .*at most 17179869184 elements a latent"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[message[:20] for _, message in REFUSALS])
def test_refuses(bad, message):
    arguments = SETTINGS | {"x": X, "v": V, "v_uncond": V, "guidance_scale": 1.5} | bad
    with pytest.raises(ValueError, match=rf"paired_step: ({message})"):
        paired_step(**arguments)
