"""What choices say, against scipy, published tables and cases counted by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fdfo_engine.choices import Choice, agreement, compared, hints_to_stop, kappa, sign_test, summary, wilson

REWARDS = {"left": (1.0, 0.0), "right": (0.0, 1.0), "tie": (0.5, 0.5), "skip": (None, None)}


def choice(event, pair, name="left", rater="ann", **more):
    """An answer where the left image is branch 0; in a repeat it is branch 1."""
    rewards = REWARDS[name][:: -1 if more.get("is_repeat") else 1]
    return Choice(event=event, round="r1", pair=pair, rater=rater, choice=name, rewards=rewards, **more)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts):
    share = wilson(*counts)
    exact = binomtest(*counts).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_a_share_of_nothing_has_no_interval():
    assert (wilson(0, 0).value, wilson(0, 0).low) == (None, None)


@given(st.integers(0, 120), st.integers(0, 120))
def test_the_sign_test_is_scipys(wins, losses):
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_kappa_of_cohens_kind_of_table():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 0.7, p_e = 0.5, so 0.4."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa(first, first) == 1.0
    assert kappa([], []) is None
    assert kappa(["tie"], ["tie"]) is None


def test_a_summary_counts_standing_answers_only():
    choices = [
        choice(1, 10, "left", ms=2000, flips=3),
        choice(2, 11, "right", ms=200),
        choice(3, 12, "left", is_withdrawn=True),
        choice(4, 12, "tie", ms=1000, zooms=1),
        choice(5, 13, "skip"),
        choice(6, 10, "right", is_repeat=True),  # the same image: it is at the other side now
        choice(7, 11, "right", is_repeat=True),  # the other image
        choice(8, 10, "right", rater="bob"),
    ]
    ann = summary(choices, "ann")
    assert (ann.answers, ann.ties, ann.skips, ann.hasty) == (3, 1, 1, 1)
    assert (ann.left.count, ann.left.total) == (1, 2)
    assert (ann.steady.count, ann.steady.total) == (1, 2)
    assert (ann.median_s, ann.flips, ann.zooms) == (1.0, 3, 1)


def test_a_later_answer_replaces_an_earlier_one():
    assert summary([choice(1, 1, "left"), choice(2, 1, "right")], "ann").left.count == 0


@pytest.mark.parametrize(("last_ties", "speaks"), [(3, False), (4, True), (30, True)])
def test_a_tired_rater_is_told(last_ties, speaks):
    first = [choice(n, n, "tie" if n < 2 else "left") for n in range(30)]
    last = [choice(30 + n, 30 + n, "tie" if n < last_ties else "right") for n in range(30)]
    assert bool(hints_to_stop(first + last)) == speaks


def test_an_unsteady_rater_is_told_once_there_are_enough_repeats():
    choices = [choice(n, n) for n in range(10)]
    unsteady = [choice(20 + n, n, "left", is_repeat=True) for n in range(4)]
    assert not hints_to_stop(choices + unsteady[:3])
    assert "0 of 4" in hints_to_stop(choices + unsteady)[0]
    assert not hints_to_stop(choices + [choice(30 + n, n, "right", is_repeat=True) for n in range(4)])


def test_agreement_of_two_raters_over_their_common_pairs():
    choices = [choice(n, n, ("left", "right")[n % 2]) for n in range(10)]
    choices += [choice(50 + n, n, ("left", "right")[n % 2], rater="bob") for n in range(4, 8)]
    assert agreement(choices) == [("ann", "bob", 4, 1.0)]


def test_a_comparison_counts_the_majority_of_each_pair():
    choices = [
        choice(1, 1, "right"), choice(2, 1, "right", rater="bob"), choice(3, 1, "left", rater="eve"),
        choice(4, 2, "left"), choice(5, 3, "tie"), choice(6, 4, "skip"),
        choice(7, 5, "left"), choice(8, 5, "right", rater="bob"),
    ]  # fmt: skip
    result = compared(choices)
    assert (result.wins, result.losses, result.ties) == (1, 1, 2)
    assert (result.rate.value, result.p) == (0.5, 1.0)
