"""Flow-GRPO: its sampler's marginals, its ratios, and its loss against the published formulas in float64."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_sd3 import PROMPTS, tiny_config
from update.test_optimizer_steps import assert_equal_bits, copy_of

from fdfo_engine import Engine, ops
from fdfo_engine.algorithms.flow_grpo import noise_levels
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.update.items import Items

STD = 0.3
PAIRED = ["a red circle", "a red circle", "one cat", "one cat"]
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
GRPO = {"algorithm": {"name": "flow_grpo"}, "sampling": {"churn": {}}}


def grid(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double()


def final_std(steps, solver, gammas):
    """Of a flow to N(0, STD^2), whose exact velocity is linear in x: a step multiplies x, and adds noise."""
    sigmas, variance = grid(steps), 1.0
    for i in range(steps):
        t = sigmas[i].item()
        slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
        arguments = {
            "sigma": t, "sigma_next": sigmas[i + 1].item(), "gamma": gammas[i + 1].item(), "seed": 0, "pair_ids": [0],
            "step": i, "solver": solver,
        }  # fmt: skip
        at_zero, at_one = (
            ops.paired_step(x, slope * x, **arguments) for x in (torch.zeros(1, 2, 1), torch.ones(1, 2, 1))
        )
        factor = (at_one - at_zero)[0, 0].item()
        eps = ops.philox_normal((1,), seed=0, pair_ids=[0], stream=ops.churn_stream(i + 1, 0), device="cpu").item()
        variance = factor**2 * variance + (at_zero[0, 0].item() / eps) ** 2
    return variance**0.5


@pytest.mark.parametrize(("steps", "above"), [(10, 0.48), (40, 0.05), (200, 0.01)])
def test_its_sampler_nears_the_odes_spread_only_with_many_steps(steps, above):
    straight = final_std(steps, "churn", torch.zeros(steps + 1))
    assert final_std(steps, "sde", noise_levels(grid(steps), 0.7)) / straight - 1 == pytest.approx(above, abs=0.005)
    churned = final_std(steps, "churn", torch.cat([torch.full((steps,), 0.0025), torch.zeros(1)]))
    assert abs(churned / straight - 1) < 0.004


def test_levels_are_the_published_ones():
    sigmas = grid(10)
    t, limit = sigmas[:-1], sigmas[1]
    expected = 0.7 * torch.sqrt(t / (1 - torch.where(t == 1, limit, t)))
    torch.testing.assert_close(noise_levels(sigmas, 0.7), torch.cat([torch.ones(1).double(), expected]))
    with pytest.raises(UsageError, match=r"algorithm.noise = 1.4: too much for step 1"):
        noise_levels(torch.tensor([1.0, 0.95, 0.5, 0.0]), 1.4)


def log_density(x, mean, std):
    return (-((x - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)).mean()


@pytest.fixture
def engine(tiny_sd3, tmp_path):
    return Engine(tiny_config(tiny_sd3, tmp_path, **GRPO))


def test_the_log_ratio_is_that_of_the_published_densities(engine):
    rollout = engine.rollout(PAIRED)
    generator = torch.Generator().manual_seed(1)
    pair, branch, step = torch.tensor([0, 3, 2, 1]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1, 2, 3])
    old = rollout.velocities[pair, branch, step]
    new = old + 0.05 * torch.randn(old.shape, generator=generator)
    found = engine._updater.algorithm.log_ratio(new, rollout, Items(pair, branch, step))
    x, after = (rollout.latents(pair, branch, s).double().numpy() for s in (step, step + 1))
    sigmas = rollout.sigmas.double().numpy()
    for b in range(4):
        t, dt = sigmas[step[b]], sigmas[step[b] + 1] - sigmas[step[b]]
        s = 0.7 * np.sqrt(t / (1 - (sigmas[1] if t == 1 else t)))
        means = (
            x[b] * (1 + s**2 * dt / (2 * t)) + v[b].double().numpy() * (1 + s**2 * (1 - t) / (2 * t)) * dt
            for v in (new, old)
        )
        std = s * np.sqrt(-dt)
        one, other = (log_density(after[b], mean, std) for mean in means)
        assert found[b].item() == pytest.approx(one - other, rel=1e-3, abs=1e-6)


def test_ratios_are_one_on_policy(engine):
    rollout = engine.rollout(PAIRED)
    assert engine.primitives.forward(rollout, parts=1).values.abs().max() < 1e-6


def test_advantages_are_relative_to_the_prompts_images(engine):
    rollout = engine.rollout(PAIRED)
    found = engine._updater.algorithm.advantage(REWARDS.double(), rollout).values
    rewards = REWARDS.double().numpy()
    means = np.repeat([rewards[:2].mean(), rewards[2:].mean()], 2)
    np.testing.assert_allclose(found, (rewards - means[:, None]) / (rewards.std() + 1e-4), rtol=1e-6)


def test_images_of_a_pair_share_no_noise(engine):
    first = engine.rollout(PROMPTS).latents(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, 0])).flatten(1)
    assert abs(torch.corrcoef(first)[0, 1]) < 0.3


def test_a_step_raises_the_likelihood_of_better_images(engine):
    rollout = engine.rollout(PAIRED)
    engine.primitives.forward_backward(rollout, rewards=REWARDS, parts=1)
    engine.primitives.optim_step(lr=1e-5)
    moved = engine.primitives.forward(rollout, parts=1).values.mean(-1).double()
    values = engine._updater.algorithm.advantage(REWARDS.double(), rollout).values.double()
    assert (moved * values).sum() > 0


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tiny_sd3, tmp_path):
    whole = Engine(tiny_config(tiny_sd3, tmp_path, **GRPO))
    whole.update(whole.rollout(PAIRED), REWARDS)
    whole.save()
    resumed = Engine.resume(tmp_path)
    for engine in (whole, resumed):
        engine.update(engine.rollout(PAIRED), REWARDS)
    assert_equal_bits(copy_of(whole), copy_of(resumed))
