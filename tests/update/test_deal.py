"""Which step of which sample is trained when."""

import numpy as np
import pytest
import torch
from ops import exact
from update.epoch_oracle import dealt_steps

from fdfo_engine.update.deal import deal_steps

FAR = 2**40 + 7


def deal(pair_ids, *, steps=12, train_steps=12, optimizer_steps=4, seed=9):
    return deal_steps(
        pair_ids, steps=steps, train_steps=train_steps, optimizer_steps=optimizer_steps, seed=seed
    )  # fmt: skip


@pytest.mark.parametrize("train_steps", [12, 8])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_shares_are_those_of_the_formula(train_steps, seed):
    ids = [0, 5, FAR]
    shares = deal(ids, train_steps=train_steps, seed=seed)
    for row, pair in enumerate(ids):
        for branch in range(2):
            expected = dealt_steps(pair, branch, steps=12, kept=train_steps, shares=4, seed=seed)
            assert [set(share.tolist()) for share in shares[:, row, branch]] == expected


def test_every_optimizer_step_sees_every_sample_and_together_every_step_once():
    shares = deal(range(50))
    assert shares.shape == (4, 50, 2, 3)
    assert shares.dtype == torch.int64
    joined = shares.permute(1, 2, 0, 3).flatten(2).sort(-1).values
    assert torch.equal(joined, torch.arange(12).expand(50, 2, 12))


def test_fewer_trained_steps_are_distinct():
    kept = deal(range(50), train_steps=8).permute(1, 2, 0, 3).flatten(2).sort(-1).values
    assert (kept.diff() > 0).all()


def test_a_sample_does_not_know_its_neighbours():
    together = deal([3, 4, FAR])
    for row, pair in enumerate([3, 4, FAR]):
        assert torch.equal(together[:, row], deal([pair])[:, 0])


def test_branches_pairs_and_seeds_are_dealt_differently():
    shares = deal(range(20))
    assert not torch.equal(shares[:, :, 0], shares[:, :, 1])
    assert not torch.equal(shares[:, 0], shares[:, 1])
    assert not torch.equal(shares, deal(range(20), seed=10))


def test_every_step_is_as_likely_in_every_share():
    """2,000 samples: 500 expected in each of 4 shares, five standard deviations allowed."""
    shares = deal(range(1000)).numpy()
    counts = np.stack([np.bincount(share.ravel(), minlength=12) for share in shares])
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize("kept", [2, 3, 6])
def test_a_stratified_subset_is_dealt_by_its_least_words(kept):
    """Of each stretch of neighbours the step with the least word; these are sorted by their words, and shared out."""
    ids = [0, 5, FAR, *range(40, 60)]
    shares = deal_steps(
        ids, steps=12, train_steps=kept, optimizer_steps=kept // (2 if kept == 6 else 1), seed=9, subset="stratified"
    )
    for row, pair in enumerate(ids):
        for branch in range(2):
            words = [exact.words((i, 2**31 + 1 + branch, pair % 2**32, pair // 2**32), (9, 0))[0] for i in range(12)]
            size = 12 // kept
            first = [min(range(at, at + size), key=words.__getitem__) for at in range(0, 12, size)]
            order = np.split(np.array(sorted(first, key=words.__getitem__)), len(shares))
            assert shares[:, row, branch].tolist() == [sorted(share.tolist()) for share in order]


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match="train_steps = 12 is no multiple of 5"):
        deal([0], optimizer_steps=5)
