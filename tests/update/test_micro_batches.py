"""(sample, step) items of a share, cut block by block; and a caller's weights on their log-ratios."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.update.items import Items
from fdfo_engine.update.objective import WeightedLogRatios
from fdfo_engine.update.primitives import _rows
from fdfo_engine.update.updater import Updater, mean_square, velocity_growth

SHARE = torch.tensor([[[0, 3], [1, 2]], [[2, 3], [0, 1]], [[0, 1], [1, 3]]])  # P = 3, both branches, two steps each


def rows(items):
    return list(zip(items.pair.tolist(), items.branch.tolist(), items.step.tolist(), strict=True))


def test_items_are_every_step_of_both_branches_of_the_given_pairs():
    items = Items.of_pairs(torch.tensor([2, 0]), SHARE)
    assert rows(items) == [
        (2, 0, 0), (2, 0, 1), (2, 1, 1), (2, 1, 3), (0, 0, 0), (0, 0, 3), (0, 1, 1), (0, 1, 2),
    ]  # fmt: skip
    assert (len(items), items.weight) == (8, 1.0)
    parts = items.chunks(3)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert [*chain(*map(rows, parts))] == rows(items)
    assert {part.weight for part in parts} == {1.0}


def test_padding_is_one_item_without_weight():
    padding = Items.padding()
    assert (rows(padding), padding.weight) == ([(0, 0, 0)], 0.0)


def test_micro_batches_stay_within_a_block_and_leave_out_what_pulls_at_nothing():
    share = torch.arange(2).expand(6, 2, 2)
    rollout = SimpleNamespace(blocks=torch.tensor([0, 0, 0, 1, 1, 2]))
    updater = SimpleNamespace(micro_batch=5)
    live = torch.tensor([True, False, True, True, True, False])
    found = Updater._blockwise(updater, rollout, live, share)
    assert [sorted(set(items.pair.tolist())) for items in found] == [[0, 2], [2], [3, 4], [4]]
    assert [len(items) for items in found] == [5, 3, 5, 3]
    assert [*chain(*map(rows, found))] == [(p, k, s) for p in (0, 2, 3, 4) for k in (0, 1) for s in (0, 1)]
    assert Updater._blockwise(updater, rollout, torch.zeros(6, dtype=torch.bool), share) == []


def weighted(weights):
    """Whose log-ratio is ten times the pair plus the step, times a velocity of one number an item."""

    def log_ratio(velocity, rollout, items):
        return velocity * (10.0 * items.pair + 100.0 * items.branch + items.step)

    return WeightedLogRatios(weights, normalizer=7, clip_range=0.03, log_ratio=log_ratio)


def test_weights_are_those_of_each_items_pair_branch_and_step():
    weights = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    items = Items.of_pairs(torch.tensor([0, 1, 2]), SHARE)
    velocity = torch.ones(len(items), requires_grad=True)
    loss, ratios = weighted(weights).loss(velocity, None, items)
    wanted = [10.0 * p + 100.0 * k + s for p, k, s in rows(items)]
    assert ratios.tolist() == wanted
    assert not ratios.requires_grad
    factors = [weights[p, k, s].item() * ratio for (p, k, s), ratio in zip(rows(items), wanted, strict=True)]
    assert loss.item() == pytest.approx(sum(factors), rel=1e-5)  # as they are: no normalizer
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert gradient.tolist() == pytest.approx(factors, rel=1e-5)


def test_an_item_of_weight_0_is_silent_even_where_its_ratio_is_no_number():
    items = Items(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([1, 1]))
    weights = torch.zeros(2, 2, 4)
    weights[1, 0, 1] = -2.0
    loss, _ = weighted(weights).loss(torch.tensor([float("inf"), 1.0]), None, items)
    assert loss.item() == -2.0 * 11
    assert weighted(weights).live.tolist() == [False, True]


def test_a_rank_takes_its_own_rows_of_what_is_given_for_all_pairs():
    rollout = SimpleNamespace(num_pairs=4, local_rows=torch.tensor([1, 3]))
    given = [[[float(10 * pair + branch)] * 3 for branch in range(2)] for pair in range(4)]
    assert _rows(rollout, "weights", given, 3)[:, :, 0].tolist() == [[10.0, 11.0], [30.0, 31.0]]
    with pytest.raises(UsageError, match=r"weights: shape \[4, 2, 3\]; takes \[4, 2, 2\]: pair, branch, step"):
        _rows(rollout, "weights", given, 2)
    assert torch.isnan(_rows(rollout, "advantages", torch.full((4, 2), float("nan")))).all(), "no opinion"


def test_growth_is_the_share_by_which_a_velocity_is_longer():
    base = torch.full((4, 2, 2, 2), 2.0)
    factors = torch.tensor([1.0, 1.5, 0.5, -3.0])
    grown = base * factors.view(-1, 1, 1, 1)
    assert velocity_growth(grown, base).tolist() == pytest.approx([0.0, 0.5, 0.0, 2.0], rel=1e-6)
    assert mean_square(grown).tolist() == pytest.approx([4.0, 9.0, 1.0, 36.0])
    assert torch.isfinite(velocity_growth(grown, torch.zeros_like(base))).all()
