"""The three churn schedules against their closed forms in float64."""

import numpy as np
import pytest
import torch
from ops import exact

from fdfo_engine.config import IntervalChurn, PriorChurn, RawChurn
from fdfo_engine.rollout.churn import churn_gammas

SEED = 11
PAIRS = [0, 3, 2**40]


def grid(steps=20, shift=3.0, first=1.0):
    t = np.append(np.linspace(first, 1 / steps, steps), 0.0)
    return torch.tensor(shift * t / (1 + (shift - 1) * t), dtype=torch.float32)


def scalars():
    """METHOD: element 0 of stream 2^31 is the pair's N(0, 1)."""
    return [exact.noise((1,), seed=SEED, pair=pair, stream=2**31)[0] for pair in PAIRS]


def assert_close(found, exact_gammas):
    exact_gammas = np.asarray(exact_gammas)
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - exact_gammas).max() <= 1e-5 * np.abs(exact_gammas).max()


def test_raw_is_one_number_but_for_the_end():
    found = churn_gammas(RawChurn(weight=0.0025), grid(), PAIRS, SEED)
    assert_close(found, [[0.0025] * 20 + [0.0]] * 3)


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_prior_acts_at_the_noisiest_point_only(spread):
    found = churn_gammas(PriorChurn(schedule="prior", weight=0.2, weight_sigma=spread), grid(), PAIRS, SEED)
    expected = np.zeros((3, 21))
    expected[:, 0] = [np.expm1(np.exp(np.log(0.2) + spread * z)) for z in scalars()]
    assert_close(found, expected)


def interval(sigmas, weight, mu, sigma, soft_sigma):
    rows = []
    for z in scalars():
        m = mu + sigma * z
        p = np.zeros(len(sigmas))
        for k, t in enumerate(sigmas[:-1]):
            if 0 < t < 1:
                logit = np.log(t / (1 - t))
                p[k] = np.exp(-((logit - m) ** 2) / (2 * soft_sigma**2)) / (
                    soft_sigma * np.sqrt(2 * np.pi) * t * (1 - t)
                )
        p = p / p.sum() if p.sum() >= 1e-6 else np.append(np.full(len(sigmas) - 1, 1 / (len(sigmas) - 1)), 0.0)
        rows.append(np.exp(weight * p) - 1)
    return rows


@pytest.mark.parametrize("first", [1.0, 0.97])
@pytest.mark.parametrize(
    "options", [{}, {"weight": 0.3, "mu": -1.0, "sigma": 0.5, "soft_sigma": 1.0}, {"mu": 0.0, "sigma": 0.0}]
)
def test_interval_is_a_normalised_logit_normal(first, options):
    churn = IntervalChurn(schedule="interval", **options)
    sigmas = grid(first=first)
    found = churn_gammas(churn, sigmas, PAIRS, SEED)
    expected = interval(sigmas.double().numpy(), churn.weight, churn.mu, churn.sigma, churn.soft_sigma)
    assert_close(found, expected)
    assert torch.log1p(found).sum(1).numpy() == pytest.approx(churn.weight)
    assert (found[:, -1] == 0).all()


def test_interval_is_normalised_down_to_a_millionth():
    """Centres that move away from the grid: the density's sum falls through 1e-6, below which it says nothing."""
    totals = []
    for mu in np.linspace(4.5, 7.0, 40):
        found = churn_gammas(IntervalChurn(schedule="interval", mu=mu, sigma=0.0), grid(), PAIRS, SEED)
        assert_close(found, interval(grid().double().numpy(), 1.0, mu, 0.0, 0.25))
        t = grid().double().numpy()[1:-1]
        z = (np.log(t / (1 - t)) - mu) / 0.25
        totals.append((np.exp(-(z**2) / 2) / (0.25 * np.sqrt(2 * np.pi) * t * (1 - t))).sum())
    assert sum(1e-6 < total < 1e-4 for total in totals) >= 3
    assert sum(1e-8 < total < 1e-6 for total in totals) >= 3


def test_interval_far_from_the_grid_is_spread_evenly():
    churn = IntervalChurn(schedule="interval", mu=40.0, sigma=0.0, soft_sigma=0.1)
    found = churn_gammas(churn, grid(), PAIRS, SEED)
    assert_close(found, [[np.expm1(1 / 20)] * 20 + [0.0]] * 3)


@pytest.mark.parametrize(
    "churn", [PriorChurn(schedule="prior", weight=0.2, weight_sigma=0.5), IntervalChurn(schedule="interval")]
)
def test_a_pair_does_not_know_its_neighbours(churn):
    together = churn_gammas(churn, grid(), PAIRS, SEED)
    assert len({tuple(row.tolist()) for row in together}) == 3
    for row, pair in enumerate(PAIRS):
        assert torch.equal(together[row], churn_gammas(churn, grid(), [pair], SEED)[0])
    assert not torch.equal(together, churn_gammas(churn, grid(), PAIRS, SEED + 1))


def test_little_churn_keeps_its_digits():
    """exp(w) - 1 would lose them all."""
    found = churn_gammas(PriorChurn(schedule="prior", weight=1e-17), grid(), PAIRS, SEED)
    assert found[:, 0].tolist() == pytest.approx([1e-17] * 3, rel=1e-6)
