"""Which branch is better, and the three reasons to say nothing."""

import pytest
import torch

from fdfo_engine.update.advantage import advantage, given_advantage

NAN, INF = float("nan"), float("inf")


def directions(count, still=()):
    u = torch.ones(count, 2, 3, 3)
    u[list(still)] = 0.0
    return u


def test_advantage_is_half_the_difference_with_both_signs():
    found = advantage(torch.tensor([[3.0, 1.0], [-1.0, 0.5]]), directions(2))
    assert found.values.tolist() == [[1.0, -1.0], [-0.75, 0.75]]
    assert found.values.dtype == torch.float32
    assert found.live.tolist() == [True, True]


@pytest.mark.parametrize("bad", [[NAN, 1.0], [1.0, NAN], [NAN, NAN], [INF, 1.0], [1.0, -INF], [INF, INF]])
def test_a_pair_without_an_opinion_is_lost(bad):
    found = advantage(torch.tensor([bad, [1.0, 0.0]]), directions(2))
    assert found.values.tolist() == [[0.0, 0.0], [0.5, -0.5]]
    assert (found.lost.tolist(), found.tied.tolist(), found.still.tolist()) == ([True, False], [False] * 2, [False] * 2)


def test_lost_tied_and_still_are_counted_apart():
    rewards = torch.tensor([[NAN, 1.0], [2.0, 2.0], [1.0, 0.0], [NAN, 0.0], [2.0, 2.0], [1.0, 0.0]])
    found = advantage(rewards, directions(6, still=(2, 3, 4)))
    assert found.lost.tolist() == [True, False, False, True, False, False]
    assert found.tied.tolist() == [False, True, False, False, True, False]
    assert found.still.tolist() == [False, False, True, False, False, False]
    assert found.live.tolist() == [False] * 5 + [True]


def test_a_difference_that_float32_would_lose_counts():
    """Rewards near 1e8: float32 has no room for the difference of 1."""
    found = advantage(torch.tensor([[1e8 + 1, 1e8]], dtype=torch.float64), directions(1))
    assert found.values.tolist() == [[0.5, -0.5]]


def test_a_difference_below_float32_is_a_tie_and_counted_as_one():
    found = advantage(torch.tensor([[1e-60, 0.0]], dtype=torch.float64), directions(1))
    assert not found.live.any()
    assert found.tied.tolist() == [True]


def test_given_advantages_are_taken_as_they_are_and_each_reason_for_none_is_counted_once():
    """Rows: both branches pull, one does, a tie, no opinion in one, equal images."""
    values = torch.tensor([[0.5, -0.25], [0.0, 2.0], [0.0, 0.0], [NAN, 1.0], [3.0, 1.0]])
    found = given_advantage(values, directions(5, still=[4]))
    assert found.values.tolist() == [[0.5, -0.25], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert found.tied.tolist() == [False, False, True, False, False]
    assert found.lost.tolist() == [False, False, False, True, False]
    assert found.still.tolist() == [False, False, False, False, True]
    assert found.live.tolist() == [True, True, False, False, False]
