"""AWM and DiffusionNFT: their losses and gradients against the published formulas in float64."""

import pytest
import torch
from tiny_sd3 import tiny_config
from update.test_optimizer_steps import assert_equal_bits, copy_of

from fdfo_engine import Engine
from fdfo_engine.ops import philox_normal
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.items import Items

PAIRED = ["a red circle", "a red circle", "one cat", "one cat"]
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
ITEMS = Items(torch.tensor([0, 3, 2]), torch.tensor([1, 0, 1]), torch.tensor([0, 2, 3]))


def make_engine(folder, run_dir, name, **sections):
    return Engine(tiny_config(folder, run_dir, algorithm={"name": name}, sampling={"churn": {}}, **sections))


def exact(rollout):
    """x_0, eps and t of ITEMS, in float64, by the noise's address."""
    pair, branch, step = ITEMS.pair, ITEMS.branch, ITEMS.step
    x0 = rollout.finals[pair, branch].double()
    ids = torch.tensor(rollout.pair_ids)[pair]
    stream = 2**29 + 2 * step + branch
    eps = philox_normal(x0.shape[1:], seed=rollout.seed, pair_ids=ids, stream=stream, device="cpu", backend="torch")
    return x0, eps.double(), rollout.sigmas.double()[step].view(-1, 1, 1, 1)


def moved(rollout):
    old = rollout.velocities[ITEMS.pair, ITEMS.branch, ITEMS.step]
    new = old + 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    return old.double(), new.requires_grad_()


def mean(x):
    return x.flatten(1).mean(1)


def awm_loss(v, v_old, x0, eps, t, advantage, clip):
    """-w mean((v - (eps - x0))^2), then the clipped ratio."""
    ratio = (mean((v_old - (eps - x0)) ** 2) - mean((v - (eps - x0)) ** 2)).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).sum()


def nft_loss(v, v_old, x0, eps, t, advantage, clip):
    """As the paper writes it, by predictions of x0 from x_t; b = 1."""
    x_t = (1 - t) * x0 + t * eps
    r = (advantage / 5).clamp(-1, 1) / 2 + 0.5
    one, other = x_t - t * v, x_t - t * (2 * v_old - v)
    weights = [mean((x - x0).abs()).detach() for x in (one, other)]
    return (5 * (r * mean((one - x0) ** 2) / weights[0] + (1 - r) * mean((other - x0) ** 2) / weights[1])).sum()


@pytest.mark.parametrize(("name", "published"), [("awm", awm_loss), ("nft", nft_loss)])
def test_loss_and_gradient_are_the_published_ones(tiny_sd3, tmp_path, name, published):
    engine = make_engine(tiny_sd3, tmp_path, name, update={"clip_range": 0.05})
    rollout = engine.rollout(PAIRED)
    old, new = moved(rollout)
    values = engine._updater.algorithm.advantage(REWARDS.double(), rollout).values
    objective = engine._updater.algorithm.objective(values, 7, 0.05)
    loss, _ = objective.loss(new, rollout, ITEMS)
    loss.backward()
    wanted = new.detach().double().requires_grad_()
    expected = published(wanted, old, *exact(rollout), values[ITEMS.pair, ITEMS.branch].double(), 0.05) / 7
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(new.grad.double(), wanted.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["awm", "nft"])
def test_the_old_velocity_is_the_models_at_the_noised_image(tiny_sd3, tmp_path, name):
    """So ratios are 1 on policy; and only the trained steps were looked at."""
    engine = make_engine(tiny_sd3, tmp_path, name, update={"train_steps": 2})
    rollout = engine.rollout(PAIRED)
    x0, eps, t = exact(rollout)
    found = rollout.latents(ITEMS.pair, ITEMS.branch, ITEMS.step)
    torch.testing.assert_close(found.double(), (1 - t) * x0 + t * eps, rtol=0, atol=1e-5)
    assert engine.primitives.forward(rollout, parts=1).values.abs().max() < 1e-6
    assert (rollout.velocities.flatten(3) != 0).any(-1).sum(-1).eq(2).all()


def test_equal_rewards_teach_nft_nothing_on_policy_and_something_off_it(tiny_sd3, tmp_path):
    engine = make_engine(tiny_sd3, tmp_path, "nft")
    rollout = engine.rollout(PAIRED)
    objective = engine._updater.algorithm.objective(torch.zeros(4, 2), 1, 0.1)
    old, new = moved(rollout)
    norms = []
    for velocity in (old.float().requires_grad_(), new):
        objective.loss(velocity, rollout, ITEMS)[0].backward()
        norms.append(velocity.grad.norm().item())
    assert norms[0] < 1e-6 * norms[1]


@pytest.mark.parametrize("name", ["awm", "nft"])
def test_a_resumed_run_and_a_saved_rollout_have_the_bits_of_a_whole_run(tiny_sd3, tmp_path, name):
    whole = make_engine(tiny_sd3, tmp_path, name)
    whole.update(whole.rollout(PAIRED), REWARDS)
    whole.save()
    resumed = Engine.resume(tmp_path)
    whole.update(whole.rollout(PAIRED), REWARDS)
    resumed.rollout(PAIRED).save(tmp_path / "rollout")
    resumed.update(Rollout.load(tmp_path / "rollout"), REWARDS)
    assert_equal_bits(copy_of(whole), copy_of(resumed))
