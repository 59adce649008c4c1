"""Which pair is shown when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdfo_engine.choices import Choice
from fdfo_engine.label.schedule import LEAST_GAP, Showing, due, showings


def answer(event, pair, choice="left", **more):
    return Choice(event=event, round="r1", pair=pair, rater="ann", choice=choice, rewards=(1.0, 0.0), **more)


@settings(deadline=None)
@given(st.integers(0, 120), st.floats(0, 0.5), st.text(max_size=5))
def test_every_pair_once_and_some_again_much_later(count, share, rater):
    pairs = [100 + 3 * n for n in range(count)]
    shown = showings(pairs, share, rater)
    assert [s.pair for s in shown if not s.is_repeat] == pairs
    again = [s.pair for s in shown if s.is_repeat]
    assert len(set(again)) == len(again)
    for pair in again:
        assert shown.index(Showing(pair, is_repeat=True)) - shown.index(Showing(pair)) > LEAST_GAP
    wanted = round(share * count) or int(share > 0)
    assert len(again) == min(wanted, max(0, count - LEAST_GAP))
    assert shown == showings(pairs, share, rater)


@pytest.mark.parametrize(("count", "repeats"), [(48, 2), (64, 3), (12, 1), (10, 0)])
def test_a_twentieth_comes_back(count, repeats):
    assert len(showings(range(count), 0.05, "ann")) == count + repeats


def test_raters_meet_other_repeats():
    assert showings(range(64), 0.05, "ann") != showings(range(64), 0.05, "bob")


def test_what_was_taken_back_waits_again_with_a_new_number():
    shown = [Showing(1), Showing(2)]
    assert [d.showing.pair for d in due(shown, [answer(1, 1)])] == [2]
    again = due(shown, [answer(1, 1, is_withdrawn=True), answer(2, 1, is_withdrawn=True)])
    assert [(d.showing.pair, d.attempt) for d in again] == [(1, 2), (2, 0)]


def test_a_skipped_pair_does_not_come_back():
    shown = [Showing(1), Showing(1, is_repeat=True)]
    assert due(shown, [answer(1, 1, "skip")]) == []
    assert [d.showing for d in due(shown, [answer(1, 1)])] == [Showing(1, is_repeat=True)]
