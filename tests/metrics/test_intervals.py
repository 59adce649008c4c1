"""Intervals against scipy's own, and by their coverage."""

import numpy as np
import pytest
from scipy import stats

from fdfo_engine.metrics import bootstrap_interval, t_interval

BASE = np.random.default_rng(1).gamma(2.0, size=40)
TUNED = BASE + np.random.default_rng(2).normal(0.3, 0.5, size=40)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_t_interval_is_that_of_the_paired_test(confidence):
    found = t_interval(TUNED - BASE, confidence)
    expected = stats.ttest_rel(TUNED, BASE).confidence_interval(confidence)
    assert found.mean == pytest.approx((TUNED - BASE).mean(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.stderr == pytest.approx(stats.sem(TUNED - BASE), rel=1e-12)
    assert found.count == 40


@pytest.mark.parametrize("resamples", [700, 1000])
def test_bootstrap_is_scipys_percentile_interval_of_the_same_draws(resamples):
    expected = stats.bootstrap(
        (TUNED - BASE,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    low, high = bootstrap_interval(TUNED - BASE, resamples=resamples, seed=7)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert (low, high) == bootstrap_interval(TUNED - BASE, resamples=resamples, seed=7)


def test_an_unknown_score_is_left_out_and_counted():
    values = np.append(TUNED, [np.nan, np.inf])
    assert t_interval(values) == t_interval(TUNED)
    assert bootstrap_interval(values, resamples=200) == bootstrap_interval(TUNED, resamples=200)


def test_too_few_numbers_have_no_interval():
    assert np.isnan(t_interval([]).mean)
    one = t_interval([2.0])
    assert (one.mean, one.count) == (2.0, 1)
    assert np.isnan([one.low, one.high, *bootstrap_interval([2.0])]).all()


def test_both_cover_the_true_mean_about_as_often_as_they_say():
    generator = np.random.default_rng(3)
    samples = generator.normal(1.0, 2.0, size=(300, 30))
    found = [t_interval(s, 0.9) for s in samples]
    covered = np.mean([i.low < 1.0 < i.high for i in found])
    resampled = [bootstrap_interval(s, 0.9, resamples=400) for s in samples]
    assert abs(covered - 0.9) < 0.05
    assert abs(np.mean([low < 1.0 < high for low, high in resampled]) - 0.9) < 0.06
