import numpy as np
import pytest
import torch
from ops.exact import check, noise, prior

from fdfo_engine.ops import SHARED_STREAM, paired_noise, philox_normal

PAIRS, SEED = [3, 2**33 + 1, 0], 2**40 + 9
GAMMA = torch.tensor([0.25, 0.0, 1.5], dtype=torch.float64)


@pytest.fixture
def sample(backend, device):
    """`paired_noise` of one backend, with the settings above unless said otherwise."""

    def sample(pairs=PAIRS, shape=(3, 7, 5), gamma=GAMMA):
        return paired_noise(pairs, shape, seed=SEED, gamma=gamma, device=device, backend=backend)

    return sample


@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (1025,)], ids=str)
def test_value(shape, sample):
    exact = [
        [prior(shape, seed=SEED, pair=p, branch=k, gamma=g) for k in (0, 1)]
        for p, g in zip(PAIRS, GAMMA.tolist(), strict=True)
    ]
    check(sample(shape=shape), np.array(exact), "x")


def test_antithetic_branches_take_one_noise_with_opposite_signs(backend, device):
    x = paired_noise(PAIRS, (3, 7, 5), seed=SEED, gamma=GAMMA, device=device, solver="antithetic", backend=backend)
    exact = []
    for pair, g in zip(PAIRS, GAMMA.tolist(), strict=True):
        n, eps = (noise((3, 7, 5), seed=SEED, pair=pair, stream=stream) for stream in (0, 1))
        exact.append([(n + sign * np.sqrt((1 + g) ** 2 - 1) * eps) / (1 + g) for sign in (1, -1)])
    check(x, np.array(exact), "x")


def test_a_real_latent_is_paired(device, backend, sample):
    x = sample([5], (16, 64, 64), gamma=0.0)
    n = philox_normal((16, 64, 64), seed=SEED, pair_ids=[5], stream=SHARED_STREAM, device=device, backend=backend)
    assert torch.equal(x[:, 0], n)
    assert torch.equal(x[:, 1], n)


def test_one_number_and_one_a_pair_give_the_same_bits(sample):
    expected = sample(gamma=0.1)
    assert torch.equal(sample(gamma=torch.full((3,), 0.1, dtype=torch.float64)), expected)
    assert torch.equal(sample(gamma=torch.tensor(0.1, dtype=torch.float64)), expected)
    table = torch.full((3, 2), 0.1, dtype=torch.float64)
    assert torch.equal(sample(gamma=table[:, 0]), expected)


def test_repeats_and_never_depends_on_the_batch(sample):
    whole = sample()
    assert torch.equal(sample(), whole)
    for i, pair in enumerate(PAIRS):
        assert torch.equal(sample([pair], gamma=GAMMA[i : i + 1])[0], whole[i])
    assert torch.equal(sample(PAIRS[::-1], gamma=GAMMA.flip(0)), whole.flip(0))


@pytest.mark.parametrize("gamma", [0.0025, 0.3, 2.0])
def test_variance_stays_1_and_branches_share_what_the_formula_says(gamma, sample):
    x = sample([1], (2**17,), gamma=gamma).double()[0]
    assert (x.var(1) - 1).abs().max() < 0.02
    assert ((x[0] * x[1]).mean() - 1 / (1 + gamma) ** 2).abs() < 0.02


def test_no_pairs(sample):
    assert sample([], gamma=0.1).shape == (0, 2, 3, 7, 5)
    assert sample([], gamma=torch.zeros(0)).shape == (0, 2, 3, 7, 5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"pair_ids": [-1, 0, 1]}, "pair_ids is"),
        ({"shape": ()}, "shape is"),
        ({"seed": -1}, "seed is"),
        ({"gamma": -0.1}, "gamma is"),
        ({"gamma": float("nan")}, "gamma is"),
        ({"gamma": float("inf")}, "gamma is"),
        ({"gamma": torch.tensor([0.1, -0.1, 0.1])}, "gamma is"),
        ({"gamma": torch.zeros(2)}, "gamma is"),
        ({"gamma": torch.zeros(3, dtype=torch.int64)}, "gamma is torch.int64"),
        ({"gamma": torch.zeros(3, device="meta")}, "gamma is"),
        ({"gamma": None}, "gamma is None"),
        ({"device": "gpu"}, "device is"),
        ({"backend": "fast"}, "backend is"),
        ({"shape": (2**34 + 1,)}, "shape is .*at most"),
    ],
    ids=str,
)
def test_refuses(bad, message):
    with pytest.raises(ValueError, match=f"paired_noise: {message}"):
        paired_noise(**{"pair_ids": PAIRS, "shape": (3, 7, 5), "seed": SEED, "gamma": GAMMA, "device": "cpu"} | bad)
