"""Who computes what: blocks over ranks, batches of images, and what stands in the padding."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fdfo_engine.models.flow_model import Grid
from fdfo_engine.ops import pair_direction
from fdfo_engine.rollout import blocks, generation
from fdfo_engine.rollout.blocks import JoinedBlocks, in_step, share
from fdfo_engine.rollout.generation import generate_share
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.rollout.sampler import SampledBlock
from fdfo_engine.runtime.errors import UsageError


@contextmanager
def as_rank(monkeypatch, rank, ranks, longest=None):
    """As rank `rank` of `ranks`, of which the longest share is `longest`."""
    with monkeypatch.context() as patch:
        for module in (blocks, generation):
            patch.setattr(module, "rank", lambda: rank, raising=False)
            patch.setattr(module, "world_size", lambda: ranks)
        patch.setattr(blocks, "max_over_ranks", lambda own: own if longest is None else longest)
        yield


def shares(monkeypatch, count, ranks, **how):
    found = []
    for rank in range(ranks):
        with as_rank(monkeypatch, rank, ranks):
            found.append(share(count, "blocks", **how))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [5, 6, 7, 23])
def test_shares_are_contiguous_complete_and_alike(monkeypatch, count, ranks):
    found = shares(monkeypatch, count, ranks)
    assert [unit for own in found for unit in own] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_too_little_for_all_ranks_is_refused_unless_they_may_idle(monkeypatch):
    assert [len(own) for own in shares(monkeypatch, 3, 3)] == [1, 1, 1]
    with pytest.raises(UsageError, match="2 blocks for 3 ranks; takes at least one a rank"):
        shares(monkeypatch, 2, 3)
    assert sorted(len(own) for own in shares(monkeypatch, 2, 3, may_idle=True)) == [0, 1, 1]
    with pytest.raises(UsageError, match="an empty list"):
        shares(monkeypatch, 0, 3, may_idle=True)


def test_a_shorter_share_repeats_its_last_unit(monkeypatch):
    with as_rank(monkeypatch, 0, 2, longest=4):
        assert in_step(range(5, 7)) == [5, 6, 6, 6]
        assert in_step(range(0)) == [0, 0, 0, 0]
        assert in_step(range(3, 7)) == [3, 4, 5, 6]


class Noting:
    """A sampler whose image is one pixel of the prompt's number, the noise's index and the seed."""

    def __init__(self):
        self.batches = []

    def generate_batch(self, network, prompts, indices, *, seed, grid, guidance):
        self.batches.append(list(indices))
        rows = [[float(prompt), float(index), float(seed)] for prompt, index in zip(prompts, indices, strict=True)]
        return torch.tensor(rows)[:, :, None, None]


def generated(sampler, count, *, batch, first=0, reached=None):
    phase = SimpleNamespace(reach=(reached if reached is not None else []).append)
    return generate_share(
        sampler, None, [str(number) for number in range(count)], phase, batch=batch, first=first, seed=9,
        grid=None, guidance=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 4, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_prompt_has_its_own_noise_in_batches_of_one_size(monkeypatch, count, ranks):
    images, sizes, longest = [], set(), -(-count // (3 * ranks))
    for rank in range(ranks):
        sampler = Noting()
        with as_rank(monkeypatch, rank, ranks, longest):
            images.append(generated(sampler, count, batch=3, first=100))
        sizes |= {len(batch) for batch in sampler.batches}
        assert len(sampler.batches) == longest, "all ranks call the network equally often"
    prompt, index, seed = torch.cat(images)[:, :, 0, 0].unbind(1)
    assert prompt.tolist() == list(range(count))
    assert index.tolist() == [100 + number for number in range(count)]
    assert seed.tolist() == [9] * count
    assert sizes == {3}, "the last batch is filled up"


def test_progress_counts_the_images_of_all_ranks(monkeypatch):
    reached = []
    with as_rank(monkeypatch, 0, 2):
        generated(Noting(), 11, batch=2, reached=reached)  # six batches, three on each rank
    assert reached == [0, 4, 8]
    reached.clear()
    generated(Noting(), 5, batch=2, reached=reached)
    assert reached == [0, 2, 4]


def block_of(first, size, steps=3):
    """Pair `first + row` has its number in every value, branch 1 half more."""
    number = torch.arange(first, first + size).float().view(-1, 1, 1, 1, 1) + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    return SampledBlock(
        latents=number.expand(size, 2, 4, 2, 2).clone(),
        images=number.expand(size, 2, 3, 8, 8).clone(),
        velocities=number[:, :, None].expand(size, 2, steps, 4, 2, 2).clone(),
        gammas=number[:, 0, 0, 0].double().expand(size, steps + 1).clone(),
    )


@pytest.mark.parametrize("renoised", [False, True])
def test_blocks_are_joined_in_their_rows_without_the_padding(renoised):
    joined, grid = JoinedBlocks(3), Grid(torch.linspace(1, 0, 4), 1000 * torch.linspace(1, 0, 4)[:3])
    for number in (1, 0, 2):
        joined.put(block_of(2 * number, 2), number)
    plan = SamplingPlan("sde" if renoised else "churn", lambda *_: None, (lambda _: None) if renoised else None)
    rollout = joined.rollout(
        plan, grid, list("abcde"), [10, 11, 12, 13, 14], backend="torch", seed=7, weights_version=2, first_pair=10,
        num_pairs=5, block_pairs=2,
    )  # fmt: skip
    latents = torch.cat([block_of(2 * number, 2).latents for number in range(3)])[:5]
    assert rollout.images[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert rollout.velocities[:, 1, 2, 0, 0, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert rollout.gammas[:, 3].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(rollout.direction, pair_direction(latents, backend="torch"))
    assert rollout.distance.tolist() == pytest.approx([0.25] * 5)  # half of a difference of one half
    assert (rollout.solver, rollout.finals is not None) == (plan.solver, renoised)
    assert not renoised or torch.equal(rollout.finals, latents)
    assert rollout.blocks.tolist() == [0, 0, 1, 1, 2]
    assert (rollout.seed, rollout.weights_version, rollout.sigmas.tolist()) == (7, 2, grid.sigmas.tolist())
