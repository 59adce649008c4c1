"""FDFO's options, and what its update is for."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.algorithms import build_algorithm
from fdfo_engine.algorithms.fdfo import difference_spread, training_chances, without_small_differences
from fdfo_engine.config import Config, ConfigError, FdfoAlgorithm
from fdfo_engine.ops import fdfo_loss, pair_direction, philox_normal
from fdfo_engine.rollout.prompts import PromptList
from fdfo_engine.update.deal import deal_steps

NAN = float("nan")
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 4.0], [3.0, 0.0], [NAN, 1.0], [0.5, 0.0]], dtype=torch.float64)


def test_a_linear_rewards_gradient_is_where_the_update_points():
    """R = g . x of latents that differ by fresh noise: the mean update along g, within its interval."""
    generator = torch.Generator().manual_seed(0)
    count, size = 4000, 64
    g = torch.randn(size, generator=generator)
    x = torch.randn(count, 1, size, generator=generator) + 0.3 * torch.randn(count, 2, size, generator=generator)
    rewards = x @ g
    half = (rewards[:, 0] - rewards[:, 1]) / 2
    v = torch.zeros(2 * count, size, requires_grad=True)
    loss, _ = fdfo_loss(
        v, torch.zeros_like(v), pair_direction(x), torch.stack([half, -half], 1).flatten(), clip_range=0.1
    )
    loss.backward()
    # data = noise - v: a better image has a smaller v along g
    step = v.grad.view(count, 2, size).sum(1)
    along = step @ g / (step.norm(dim=1) * g.norm())
    assert along.min() >= -1e-6
    mean = step.mean(0)
    cosine = (mean @ g / (mean.norm() * g.norm())).item()
    # each pair adds its g-component and size - 1 directions of noise: tan(angle) is about sqrt(size / count)
    assert cosine > math.cos(math.atan(2 * math.sqrt(size / count)))


def test_small_differences_become_ties():
    found = without_small_differences(REWARDS, 0.5)
    assert torch.equal(found[1:3], REWARDS[1:3])
    assert found[0].tolist() == found[4].tolist() == [0, 0]
    assert found[3].isnan().any()
    assert torch.equal(without_small_differences(REWARDS, 0.99)[:3], REWARDS[:3])


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_chances_grow_with_the_gradient_up_to_certainty(share):
    sizes = torch.tensor([0.0, 0.1, 0.2, 1.0, 5.0, 0.1], dtype=torch.float64)
    chances = training_chances(sizes, share)
    assert chances[0] == 0
    assert chances.sum().item() == pytest.approx(5 * share)
    assert bool((chances <= 1).all())
    below = (chances < 1) & (sizes > 0)
    assert (chances[below] / sizes[below]).std() < 1e-12 if below.any() else share == 1
    assert not training_chances(torch.zeros(3, dtype=torch.float64), share).any()


def test_the_mean_over_draws_is_the_whole_advantage(tiny_sd3, tmp_path):
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.1, 0.0], [0.5, 0.5]], dtype=torch.float64)
    settings = {"algorithm": {"importance_share": 0.5}, "sampling": {"pairs_per_epoch": 4, "steps": 1}}
    config = tiny_config(tiny_sd3, tmp_path, **settings, update={"optimizer_steps": 1})
    with Engine(config) as engine:
        rollout, algorithm = engine.rollout(PROMPTS[:4]), build_algorithm(config, "torch")
        values = [replace(algorithm, seed=seed).advantage(rewards, rollout).values for seed in range(1000)]
    drawn = torch.stack(values).double()
    whole = replace(algorithm, settings=FdfoAlgorithm()).advantage(rewards, rollout).values
    error = drawn.std(0) / 1000**0.5
    assert ((drawn.mean(0) - whole).abs() <= 4 * error + 1e-9).all()
    assert (drawn != 0).any(2).sum(1).double().mean().item() == pytest.approx(1.5, abs=0.1)  # half of three


def test_antithetic_branches_lie_opposite_of_the_churnless_path(tiny_sd3, tmp_path):
    """With one churned step before a velocity of nothing, the branches' mean is the path without churn."""
    for noise, is_opposite in (("antithetic", True), ("independent", False)):
        sampling = {"pairs_per_epoch": 2, "steps": 2, "churn": {"schedule": "prior", "weight": 0.4}}
        settings = {"algorithm": {"branch_noise": noise}, "sampling": sampling, "update": {"optimizer_steps": 1}}
        with Engine(tiny_config(tiny_sd3, tmp_path / noise, **settings)) as engine:
            rollout = engine.rollout(PROMPTS[:2])
        zero = torch.zeros(2, dtype=torch.int64)
        first, second = (rollout.latents(torch.arange(2), zero + k, zero) for k in (0, 1))
        shared = philox_normal(first.shape[1:], seed=rollout.seed, pair_ids=rollout.pair_ids, stream=0, device="cpu")
        kept = shared / (1 + rollout.gammas[:, 0].float().view(-1, 1, 1, 1))
        assert torch.allclose((first + second) / 2, kept, atol=1e-5) == is_opposite


def test_spread_is_the_root_mean_square_of_half_differences():
    assert difference_spread(REWARDS) == pytest.approx(math.sqrt((0.25 + 4 + 2.25 + 0.0625) / 4))
    assert difference_spread(torch.ones(3, 2)) == 1.0


def test_pairs_left_out_cost_nothing_and_the_others_pull_as_before(tiny_sd3, tmp_path):
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.1, 0.0], [0.0, 0.2]])
    half, whole = (
        Engine(tiny_config(tiny_sd3, tmp_path / name, algorithm={"keep_share": share}))
        for name, share in (("a", 0.5), ("b", 1.0))
    )
    half.primitives.forward_backward(half.rollout(PROMPTS), rewards=rewards)
    answer = whole.primitives.forward_backward(
        whole.rollout(PROMPTS), rewards=torch.tensor([[1.0, 0.0], [0.0, 2.0], [0, 0], [0, 0]])
    )
    assert answer["zero_gradient_share"] == 0.5
    found, wanted = half.trainer.gradients(), whole.trainer.gradients()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_neighbouring_pairs_take_one_prompt():
    order = PromptList(["a", "b", "c", "d"], seed=3)
    groups = PromptList(["a", "b", "c", "d"], seed=3, pairs_per_prompt=3)
    assert groups.of_pairs(range(24)) == [prompt for prompt in order.of_pairs(range(8)) for _ in range(3)]


def test_a_stratified_subset_takes_one_step_of_each_stretch():
    arguments = {"steps": 12, "train_steps": 4, "optimizer_steps": 2, "seed": 7}
    dealt = deal_steps(range(300), **arguments, subset="stratified")
    together = dealt.permute(1, 2, 0, 3).flatten(2).sort(-1).values
    assert torch.equal(together // 3, torch.arange(4).expand_as(together))
    counts = torch.bincount(together.flatten(), minlength=12)
    assert counts.min() > 0.8 * 200
    assert torch.equal(deal_steps([250], **arguments, subset="stratified"), dealt[:, 250:251])


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"update": {"subset": "stratified", "train_steps": 3, "optimizer_steps": 1}}, "update.subset"),
        ({"sampling": {"pairs_per_prompt": 3}}, "sampling.pairs_per_prompt"),
        ({"algorithm": {"name": "flow_grpo"}}, "sampling.churn"),
        ({"algorithm": {"name": "ppo"}}, "algorithm"),
        ({"algorithm": {"name": "nft", "keep_share": 0.5}}, "keep_share"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(tiny_sd3, tmp_path, sections, key):
    with pytest.raises((ConfigError, ValueError), match=key):
        tiny_config(tiny_sd3, tmp_path, **sections)


def test_the_default_is_fdfo_as_published(tiny_sd3, tmp_path):
    config: Config = tiny_config(tiny_sd3, tmp_path)
    assert config.algorithm.model_dump() == {
        "name": "fdfo", "keep_share": 1.0, "importance_share": 1.0, "branch_noise": "independent",
        "advantage_scale": "none",
    }  # fmt: skip
    assert (config.sampling.pairs_per_prompt, config.update.subset) == (1, "random")
