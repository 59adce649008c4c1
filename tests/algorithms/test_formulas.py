"""The algorithms' parts on a rollout that is made up, each against its formula in float64: no model, no engine."""

import numpy as np
import pytest
import torch
from ops import exact

from fdfo_engine.algorithms import fdfo as fdfo_module
from fdfo_engine.algorithms.ablation import Ablation, own_line
from fdfo_engine.algorithms.clipped_ratio import ClippedRatio
from fdfo_engine.algorithms.fdfo import Fdfo, drawn, gradient_sizes, without_small_differences
from fdfo_engine.algorithms.groups import group_advantage, group_relative
from fdfo_engine.algorithms.nft import Nft
from fdfo_engine.config import AblationAlgorithm, FdfoAlgorithm, NftAlgorithm, RawChurn
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.advantage import given_advantage
from fdfo_engine.update.items import Items

PAIRS, STEPS, SHAPE, SEED, FIRST = 4, 3, (4, 2, 2), 2**40 + 5, 9
ITEMS = Items(torch.tensor([0, 3, 2, 3]), torch.tensor([1, 0, 1, 1]), torch.tensor([0, 2, 1, 1]))
PICKED = list(zip(ITEMS.pair.tolist(), ITEMS.branch.tolist(), ITEMS.step.tolist(), strict=True))
NAN = float("nan")


def drawn_numbers(*shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


@pytest.fixture
def rollout():
    return Rollout(
        images=torch.zeros(PAIRS, 2, 3, 8, 8), prompts=["a", "b", "a", "c"],
        pair_ids=list(range(FIRST, FIRST + PAIRS)), velocities=drawn_numbers(PAIRS, 2, STEPS, *SHAPE, seed=1),
        direction=drawn_numbers(PAIRS, *SHAPE, seed=2), distance=torch.ones(PAIRS),
        gammas=torch.zeros(PAIRS, STEPS + 1, dtype=torch.float64), sigmas=torch.tensor([1.0, 0.8, 0.5, 0.0]),
        timesteps=torch.tensor([1000.0, 800.0, 500.0]), seed=SEED, weights_version=0, first_pair=FIRST,
        num_pairs=PAIRS, block_pairs=2, backend="torch", finals=drawn_numbers(PAIRS, 2, *SHAPE, seed=3),
    )  # fmt: skip


def renoised(rollout):
    """Of ITEMS x_0, eps and t, in float64 by METHOD's and DESIGN's addresses."""
    rows = []
    for pair, branch, step in PICKED:
        eps = exact.noise(SHAPE, seed=SEED, pair=FIRST + pair, stream=2**29 + 2 * step + branch)
        rows.append((rollout.finals[pair, branch].double(), torch.from_numpy(eps)))
    x0, eps = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return x0, eps, rollout.sigmas.double()[ITEMS.step].view(-1, 1, 1, 1)


def mean(x):
    return x.flatten(1).mean(1)


def test_half_of_the_pairs_are_those_that_differ_most():
    """Kept are as many as the share rounds to, at least one, of those with an opinion; equals stay together."""
    rewards = torch.tensor([[0.0, 5.0], [1.0, 0.0], [NAN, 0.0], [0.0, 3.0], [2.0, 0.0], [7.0, 4.0]]).double()
    for share, kept in (
        (0.05, [0]),
        (0.2, [0]),
        (0.4, [0, 3, 5]),
        (0.6, [0, 3, 5]),
        (0.8, [0, 3, 4, 5]),
        (1.0, [0, 1, 3, 4, 5]),
    ):
        found = without_small_differences(rewards, share)
        ties = [row for row in range(6) if row != 2 and found[row, 0] == found[row, 1]]
        assert sorted({0, 1, 3, 4, 5} - set(ties)) == kept, share
        assert torch.equal(found[kept], rewards[kept])
        assert torch.isnan(found[2, 0])
    assert torch.equal(without_small_differences(rewards[2:3], 0.5).isnan(), rewards[2:3].isnan())


def test_a_pair_pulls_as_hard_as_its_advantage_and_its_direction(rollout):
    values = torch.tensor([[0.5, -0.5], [-2.0, 2.0], [0.0, 0.0], [1.0, -1.0]])
    found = gradient_sizes(given_advantage(values, rollout.direction), rollout)
    rms = rollout.direction.double().flatten(1).square().mean(1).sqrt()
    assert found.tolist() == pytest.approx((torch.tensor([0.5, 2.0, 0.0, 1.0]) * rms).tolist())


def test_a_pair_is_drawn_where_its_word_lies_below_its_chance_and_counts_by_its_inverse(rollout):
    key = (SEED % 2**32, SEED // 2**32)
    words = [exact.words((0, 2**31 + 4, FIRST + row, 0), key)[0] for row in range(PAIRS)]
    places = torch.tensor([(word + 0.5) / 2**32 for word in words], dtype=torch.float64)
    found = given_advantage(torch.tensor([[1.0, -1.0]] * PAIRS), rollout.direction)
    chances = places * torch.tensor([1.001, 0.999, 1.5, 0.0])
    kept = drawn(found, chances, rollout, SEED).values
    wanted = [1 / chances[0].item(), 0.0, 1 / chances[2].item(), 0.0]
    assert kept[:, 0].tolist() == pytest.approx(wanted)
    assert torch.equal(kept[:, 1], -kept[:, 0])


def fdfo(**settings):
    return Fdfo(FdfoAlgorithm(**settings), RawChurn(), SEED, "torch")


REWARDS = torch.tensor([[3.0, 1.0], [0.0, 4.0], [1.0, NAN], [0.5, 0.0]], dtype=torch.float64)


def test_advantages_are_halves_and_after_their_spread_of_size_one(rollout):
    assert fdfo().advantage(REWARDS, rollout).values.tolist() == [[1, -1], [-2, 2], [0, 0], [0.25, -0.25]]
    spread = ((1 + 4 + 0.0625) / 3) ** 0.5
    found = fdfo(advantage_scale="spread").advantage(REWARDS, rollout).values
    assert found[:, 0].tolist() == pytest.approx([1 / spread, -2 / spread, 0, 0.25 / spread])
    kept = fdfo(keep_share=0.67).advantage(REWARDS, rollout)
    assert kept.values[:, 0].tolist() == [1, -2, 0, 0]
    assert (kept.tied.tolist(), kept.lost.tolist()) == ([False] * 3 + [True], [False, False, True, False])


def test_a_rank_has_the_advantages_of_its_own_pairs(rollout):
    own = rollout.keep([FIRST + 1, FIRST + 3])
    own.kept, own.num_pairs = None, PAIRS  # as the second half of a rollout over two ranks, every other pair
    assert fdfo().advantage(REWARDS, own).values[:, 0].tolist() == [-2, 0.25]
    spread = ((1 + 4 + 0.0625) / 3) ** 0.5
    assert fdfo(advantage_scale="spread").advantage(REWARDS, own).values[0, 0] == pytest.approx(-2 / spread), "of all"


def test_chances_are_of_all_ranks_pairs_and_each_rank_takes_its_own(rollout, monkeypatch):
    """Two of four pairs are here: what the others weigh decides how likely these are."""
    whole = fdfo(importance_share=0.5).advantage(REWARDS, rollout).values
    own = rollout.keep([FIRST + 1, FIRST + 3])
    own.kept, own.num_pairs = None, PAIRS
    sizes = gradient_sizes(fdfo().advantage(REWARDS, rollout), rollout)
    monkeypatch.setattr(fdfo_module, "all_gather_rows", lambda values: sizes)
    assert torch.equal(fdfo(importance_share=0.5).advantage(REWARDS, own).values, whole[[1, 3]])
    assert (whole != 0).any()


def test_the_loss_and_its_gradient_are_the_methods(rollout):
    """Float64 by the distances to the target velocity, for both branches and signs."""
    values = torch.tensor([[0.7, -0.7], [1.0, -1.0], [0.0, 0.0], [-1.5, 1.5]])
    objective = fdfo().objective(values, 7, 0.03)
    assert objective.live.tolist() == [True, True, False, True]
    rollout.direction *= 0.1
    old = rollout.velocities[ITEMS.pair, ITEMS.branch, ITEMS.step]
    new = (old + 0.05 * drawn_numbers(len(ITEMS), *SHAPE, seed=4)).requires_grad_()
    loss, ratios = objective.loss(new, rollout, ITEMS)
    loss.backward()
    sign = (1.0 - 2.0 * ITEMS.branch).double().view(-1, 1, 1, 1)
    u = (sign * rollout.direction[ITEMS.pair].double()).numpy()
    signed = values[ITEMS.pair, ITEMS.branch].double().numpy()
    value, log_ratio, gradient = exact.loss(exact.wide(new), exact.wide(old), u, signed, 0.03, 7)
    assert loss.item() == pytest.approx(value, rel=1e-4)
    assert ratios.tolist() == pytest.approx(log_ratio.tolist(), rel=1e-4)
    torch.testing.assert_close(new.grad.double(), torch.from_numpy(gradient), rtol=1e-4, atol=1e-7)
    again = fdfo().log_ratio(new.detach(), rollout, ITEMS)
    assert again.tolist() == pytest.approx(log_ratio.tolist(), rel=1e-4)


def test_each_image_is_held_against_its_group_and_the_spread_of_all():
    rewards = torch.tensor([[1.0, 2.0], [5.0, NAN], [3.0, 4.0], [9.0, 9.5], [float("inf"), 0.0]]).double()
    groups = torch.tensor([7, 7, 7, 2, 2])
    found = group_relative(rewards, groups, clip=1.1)
    known = np.array([1.0, 2.0, 3.0, 4.0, 9.0, 9.5])
    spread = known.std() + 1e-4
    first, second = known[:4].mean(), known[4:].mean()
    wanted = np.array([[1.0 - first, 2.0 - first], [3.0 - first, 4.0 - first], [9 - second, 9.5 - second]]) / spread
    assert np.allclose(found[[0, 2, 3]].numpy(), wanted, rtol=1e-12)
    assert torch.isnan(found[[1, 4]]).all()
    assert np.abs(wanted).max() < 1.1
    assert np.allclose(group_relative(rewards, groups, clip=0.1)[[0, 2, 3]].numpy(), wanted.clip(-0.1, 0.1))
    assert torch.isnan(group_relative(torch.full((2, 2), NAN), torch.tensor([0, 1]), 5.0)).all()
    settled = group_relative(torch.tensor([[0.0, 1e-4]], dtype=torch.float64), torch.tensor([0]), 5.0)
    assert settled[0].tolist() == pytest.approx([-1 / 3, 1 / 3], rel=1e-6), "half of 1e-4 against 1.5e-4"


def test_images_of_equal_prompts_are_a_group(rollout):
    rewards = torch.tensor([[1.0, 2.0], [5.0, 5.0], [3.0, 6.0], [8.0, 8.0]]).double()
    found = group_advantage(rewards, rollout, 5.0).values
    spread = rewards.numpy().std() + 1e-4
    group = (1 + 2 + 3 + 6) / 4
    wanted = [
        [(1 - group) / spread, (2 - group) / spread],
        [0, 0],
        [(3 - group) / spread, (6 - group) / spread],
        [0, 0],
    ]
    assert np.allclose(found.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("signed", [1.0, -2.0])
def test_a_ratio_is_held_back_only_where_it_helps_too_much(signed):
    """PPO's clip: beyond 1 + c no gradient for a good image, below 1 - c none for a bad one."""
    ratios = torch.tensor([-0.5, -0.05, 0.0, 0.05, 0.5], requires_grad=True)
    items = Items(
        torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    )
    values = torch.tensor([[99.0, signed]])
    objective = ClippedRatio(values, 4, 0.1, lambda velocity, rollout, which: velocity)
    loss, told = objective.loss(ratios, None, items)
    rho = np.exp(np.array([-0.5, -0.05, 0.0, 0.05, 0.5]))
    assert loss.item() == pytest.approx(np.maximum(-signed * rho, -signed * rho.clip(0.9, 1.1)).sum() / 4, rel=1e-6)
    loss.backward()
    free = rho < 1.1 if signed > 0 else rho > 0.9
    assert ratios.grad.tolist() == pytest.approx(np.where(free, -signed * rho / 4, 0.0).tolist(), rel=1e-5)
    assert (told.requires_grad, told.tolist()) == (False, ratios.tolist())
    assert ClippedRatio(torch.tensor([[0.0, 0.0], [0.0, -1.0]]), 4, 0.1, None).live.tolist() == [False, True]


@pytest.mark.parametrize("is_near", [False, True])
@pytest.mark.parametrize("reach", [1.0, 0.5])
def test_nft_weighs_both_predictions_by_the_reward_at_any_reach(rollout, reach, is_near):
    """As the paper writes it: predictions of x0 from x_t with v+ = b v + (1 - b) v_old and v- = (1 + b) v_old - b v."""
    clip = 3.0
    algorithm = Nft(NftAlgorithm(name="nft", reach=reach, advantage_clip=clip), None, "torch")
    values = torch.tensor([[0.3, -0.9], [0.0, 0.0], [1.0, 2.0], [-6.0, 2.0]])
    x0, eps, t = renoised(rollout)
    if is_near:  # as a trained model's: a thousandth from the line of its image
        near_line = (eps - x0 + 1e-3 * drawn_numbers(len(ITEMS), *SHAPE, seed=7)).float()
        rollout.velocities[ITEMS.pair, ITEMS.branch, ITEMS.step] = near_line
    old = rollout.velocities[ITEMS.pair, ITEMS.branch, ITEMS.step].double()
    moved = (1e-3 if is_near else 0.3) * drawn_numbers(len(ITEMS), *SHAPE, seed=5).double()
    new = (old + moved).float().requires_grad_()
    objective = algorithm.objective(values, 6, 0.03)
    loss, _ = objective.loss(new, rollout, ITEMS)
    loss.backward()
    v = new.detach().double().requires_grad_()
    x_t = (1 - t) * x0 + t * eps
    near, far = x_t - t * (reach * v + (1 - reach) * old), x_t - t * ((1 + reach) * old - reach * v)
    share = (values[ITEMS.pair, ITEMS.branch].double() / clip).clamp(-1, 1) / 2 + 0.5
    parts = [mean((x - x0) ** 2) / mean((x - x0).abs()).detach() for x in (near, far)]
    wanted = (clip / reach * (share * parts[0] + (1 - share) * parts[1])).sum() / 6
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3 if is_near else 1e-5)
    torch.testing.assert_close(
        new.grad.double(), v.grad, rtol=1e-2 if is_near else 1e-4, atol=1e-4 if is_near else 1e-7
    )
    assert objective.live.tolist() == [True] * PAIRS


@pytest.mark.parametrize("direction", ["pair", "image"])
def test_an_ablations_direction_is_the_pairs_or_the_images_own(rollout, direction):
    settings = AblationAlgorithm(name="ablation", states="renoised", direction=direction)
    algorithm = Ablation(settings, RawChurn(), SEED, lambda ids: None, "torch")
    x0, eps, t = renoised(rollout)
    line = ((1 - t) * x0 + t * eps - x0) / t
    torch.testing.assert_close(own_line(rollout, ITEMS).double(), line, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(line, eps - x0)
    old = rollout.velocities[ITEMS.pair, ITEMS.branch, ITEMS.step].double()
    sign = (1.0 - 2.0 * ITEMS.branch).double().view(-1, 1, 1, 1)
    u = sign * rollout.direction[ITEMS.pair].double() if direction == "pair" else old - line
    torch.testing.assert_close(algorithm.direction(rollout, ITEMS).double(), u, rtol=1e-4, atol=1e-5)
    e = 0.1 * drawn_numbers(len(ITEMS), *SHAPE, seed=6).double()
    wanted = -(mean(e**2) + 2 * mean(e * u))
    found = algorithm.log_ratio((old + e).float(), rollout, ITEMS)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-3)
    values = torch.tensor([[0.7, -0.7], [1.0, -1.0], [0.5, -0.5], [-1.5, 1.5]])
    loss, ratios = algorithm.objective(values, 5, 0.2).loss((old + e).float(), rollout, ITEMS)
    signed = values[ITEMS.pair, ITEMS.branch].double().numpy()
    value, _, _ = exact.loss((old + e).numpy(), old.numpy(), u.numpy(), signed, 0.2, 5)
    assert loss.item() == pytest.approx(value, rel=1e-3)
    assert ratios.tolist() == pytest.approx(wanted.tolist(), rel=1e-3)


def test_two_noises_share_next_to_nothing_and_plans_say_where_they_look():
    sigmas = torch.linspace(1, 0, STEPS + 1)
    one, two = (
        Ablation(AblationAlgorithm(name="ablation", pairing=pairing), RawChurn(weight=0.01), SEED, None, "torch")
        for pairing in ("one_noise", "two_noises")
    )
    assert one.plan.gammas(sigmas, [0, 1]).tolist() == [[0.01, 0.01, 0.01, 0.0]] * 2
    assert two.plan.gammas(sigmas, [0, 1]).tolist() == [[1e6, 0.01, 0.01, 0.0]] * 2
    assert (one.plan.solver, one.plan.renoised_steps) == ("churn", None)
    assert fdfo().plan.solver == "churn"
    assert fdfo(branch_noise="antithetic").plan.solver == "antithetic"
    assert fdfo().plan.gammas(sigmas, [3]).tolist() == [[0.0025] * 3 + [0.0]]
