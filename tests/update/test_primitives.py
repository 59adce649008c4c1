"""An update taken apart is the same update; a caller's own loss has the gradient that autograd gives it."""

import pytest
import torch
from tiny_sd3 import PROMPTS, tiny_config
from update.test_optimizer_steps import REWARDS, assert_equal_bits, copy_of

from fdfo_engine import Engine
from fdfo_engine.ops import log_ratio
from fdfo_engine.runtime.errors import UsageError

NAN = float("nan")
STAGES = [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]


@pytest.fixture
def engine(tiny_sd3, tmp_path):
    return Engine(tiny_config(tiny_sd3, tmp_path))


@pytest.mark.parametrize("stage", STAGES)
def test_a_loop_of_primitives_gives_the_bits_of_update(tiny_sd3, tmp_path, stage):
    whole, parts = (
        Engine(tiny_config(tiny_sd3, tmp_path / name, zero={"stage": stage}, update={"ema": 0.7})) for name in "ab"
    )
    for rewards in (REWARDS, torch.tensor([[1.0, 0.0], [2.0, 2.0], [NAN, 0.0], [0.0, 5.0]])):
        metrics = whole.update(whole.rollout(PROMPTS), rewards)
        rollout = parts.rollout(PROMPTS)
        answers = []
        for part in range(2):
            answers.append(parts.primitives.forward_backward(rollout, rewards=rewards, part=part))
            step = parts.primitives.optim_step()
            assert step.applied
        parts.end_epoch()
        assert_equal_bits(copy_of(whole), copy_of(parts))
        assert_equal_bits(whole.ema, parts.ema)
        assert sum(a["loss"] for a in answers) / 2 == metrics["loss"]
        assert max(a["log_ratio_largest"] for a in answers) == metrics["log_ratio_largest"]
    assert answers[0]["zero_gradient_share"] == 0.5
    assert parts.epoch == whole.epoch == 2


def test_advantages_are_what_rewards_are_halved_to(tiny_sd3, tmp_path):
    by_rewards, by_advantages = (Engine(tiny_config(tiny_sd3, tmp_path / name)) for name in "ab")
    half = (REWARDS[:, 0] - REWARDS[:, 1]) / 2
    by_rewards.primitives.forward_backward(by_rewards.rollout(PROMPTS), rewards=REWARDS)
    by_advantages.primitives.forward_backward(by_advantages.rollout(PROMPTS), advantages=torch.stack([half, -half], 1))
    assert_equal_bits(by_rewards.trainer.gradients(), by_advantages.trainer.gradients())


@pytest.mark.parametrize("stage", STAGES)
def test_more_gradients_add_up_in_one_optimiser_step(tiny_sd3, tmp_path, stage):
    """Two parts in one step, against one part that holds both: the same items, each divided by half as many."""
    split, joined = (Engine(tiny_config(tiny_sd3, tmp_path / name, zero={"stage": stage})) for name in "ab")
    rollout = split.rollout(PROMPTS)
    for part in range(2):
        split.primitives.forward_backward(rollout, rewards=REWARDS, part=part, more=part == 0)
    joined.primitives.forward_backward(joined.rollout(PROMPTS), rewards=REWARDS, parts=1)
    found, wanted = split.trainer.gradients(), joined.trainer.gradients()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], 2 * gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item()), name
    assert split.primitives.optim_step().applied


def test_a_last_gradient_of_nothing_still_closes_the_step(engine, tiny_sd3, tmp_path):
    alone = Engine(tiny_config(tiny_sd3, tmp_path / "alone"))
    engine.primitives.forward_backward(engine.rollout(PROMPTS), rewards=REWARDS, more=True)
    told = engine.primitives.forward_backward(engine.rollout(PROMPTS), rewards=torch.ones(4, 2), allow_stale=True)
    assert (told["items"], told["loss"], told["zero_gradient_share"]) == (0, 0.0, 1.0)
    alone.primitives.forward_backward(alone.rollout(PROMPTS), rewards=REWARDS)
    assert_equal_bits(alone.trainer.gradients(), engine.trainer.gradients())


@pytest.mark.parametrize("stage", STAGES)
def test_a_discarded_gradient_leaves_no_trace(tiny_sd3, tmp_path, stage):
    clean, spoilt = (Engine(tiny_config(tiny_sd3, tmp_path / name, zero={"stage": stage})) for name in "ab")
    rollouts = [engine.rollout(PROMPTS) for engine in (clean, spoilt)]
    for more in (True, False):
        spoilt.primitives.forward_backward(rollouts[1], rewards=-3 * REWARDS, more=more)
        spoilt.primitives.discard()
    clean.update(rollouts[0], REWARDS)
    spoilt.update(rollouts[1], REWARDS)
    assert_equal_bits(copy_of(clean), copy_of(spoilt))


def test_a_stop_amid_a_gradient_drops_it(engine, tiny_sd3, tmp_path):
    clean = Engine(tiny_config(tiny_sd3, tmp_path / "clean"))
    rollout, calls = engine.rollout(PROMPTS), []

    def stop():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    engine.poll = stop
    with pytest.raises(KeyboardInterrupt):
        engine.primitives.forward_backward(rollout, rewards=REWARDS)
    engine.poll = lambda: None
    clean.update(clean.rollout(PROMPTS), REWARDS)
    engine.update(rollout, REWARDS)
    assert_equal_bits(copy_of(clean), copy_of(engine))


def ppo_weights(ratios, advantages, clip):
    """dL/dl of the mean of `max(-A rho, -A clip(rho, 1 - c, 1 + c))`, as a client would write it."""
    rho = ratios.double().exp()
    is_clipped = torch.where(advantages > 0, rho > 1 + clip, rho < 1 - clip)
    return torch.where(is_clipped, 0.0, -advantages * rho) / ratios.numel()


def test_a_loss_by_weights_has_the_gradient_of_the_same_loss_in_process(engine):
    """PPO's clip, off-policy so that some items are clipped, against autograd through the network itself."""
    rollout = engine.rollout(PROMPTS)
    engine.primitives.forward_backward(rollout, rewards=REWARDS, part=0)
    engine.primitives.optim_step()
    advantages = torch.tensor([[1.0, -1.0], [0.5, -0.5], [-2.0, 2.0], [0.0, 0.0]]).double()[:, :, None]
    ratios = engine.primitives.forward(rollout, part=1)
    clip = ratios.values.abs().median().item()
    weights = ppo_weights(ratios.values, advantages, clip)
    assert 0 < (weights == 0).double().mean() < 1
    engine.primitives.forward_backward(rollout, weights=weights, part=1)
    found = engine.trainer.gradients()
    engine.primitives.discard()

    pair, branch, _ = (
        index.flatten() for index in torch.meshgrid(*map(torch.arange, ratios.steps.shape), indexing="ij")
    )
    step = ratios.steps.flatten()
    conditioning, _ = engine.sampler.conditioning([PROMPTS[p] for p in pair])
    parameters = dict(engine.model.trained_parameters())
    v = engine.model.velocity(
        engine.model.network, rollout.latents(pair, branch, step), rollout.timesteps[step], conditioning
    )
    ell = log_ratio(
        v, rollout.velocities[pair, branch, step], rollout.direction, pair=pair, branch=branch, backend="torch"
    )
    rho, signed = ell.double().exp(), advantages.expand(ratios.steps.shape).flatten()
    loss = torch.maximum(-signed * rho, -signed * rho.clamp(1 - clip, 1 + clip)).mean()
    exact = torch.autograd.grad(loss, list(parameters.values()))
    whole = torch.cat([g.flatten() for g in exact])
    difference = torch.cat([(found[name] - g).flatten() for name, g in zip(parameters, exact, strict=True)])
    assert difference.norm() < 1e-6 * whole.norm()


def test_log_ratios_are_zero_on_policy_and_of_every_trained_step(engine):
    rollout = engine.rollout(PROMPTS)
    found = [engine.primitives.forward(rollout, part=part) for part in range(2)]
    assert torch.cat([f.steps for f in found], 2).sort(-1).values.eq(torch.arange(4)).all()
    assert all(f.values.abs().max() < 1e-5 for f in found)


def test_a_gradient_tells_the_methods_figures_of_its_items(engine):
    """Off policy, so that nothing is 0; at a clip range of its own, of which half of the items are beyond."""
    rollout = engine.rollout(PROMPTS)
    engine.primitives.forward_backward(rollout, rewards=REWARDS, part=0)
    engine.primitives.optim_step()
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [5.0, 5.0]])
    ratios = engine.primitives.forward(rollout, part=1).values.double()
    clip = (ratios[:3].exp() - 1).abs().median().item()
    told = engine.primitives.forward_backward(rollout, rewards=rewards, part=1, clip_range=clip)
    half = ((rewards[:, 0] - rewards[:, 1]) / 2).double()
    advantages = torch.stack([half, -half], 1)[:, :, None]
    rho = ratios.exp()
    loss = -advantages * rho + advantages.abs() / (2 * clip) * (rho - 1) ** 2
    live = ratios[:3]
    assert told["loss"] == pytest.approx(loss.sum().item() / 16, rel=1e-4)  # two branches, four pairs, two steps
    assert told["items"] == live.numel() == 12
    assert told["log_ratio_mean"] == pytest.approx(live.mean().item(), rel=1e-3)
    assert told["log_ratio_largest"] == pytest.approx(live.abs().max().item(), rel=1e-3)
    assert told["clip_fraction"] == pytest.approx(0.5, abs=1 / 11)
    assert told["zero_gradient_share"] == 0.25
    assert told["distance_rms"] == pytest.approx(rollout.distance.double().square().mean().sqrt().item(), rel=1e-6)
    assert rollout.distance.max() / rollout.distance.min() > 1, "the root of a mean of squares is no mean"


def test_progress_counts_micro_batches_of_all_shares_and_the_network_trains_meanwhile(engine):
    rollout, reached, modes = engine.rollout(PROMPTS), [], []

    def reach(done, total):
        reached.append((done, total))
        modes.append(engine.model.network.training)

    assert not engine.model.network.training
    engine._updater.update(rollout, REWARDS.double(), reach)
    count = len(reached)  # in blocks of two pairs: eight items in micro-batches of five, in each of two steps
    assert reached == [(done, 8) for done in range(count)]
    assert count == 8
    assert all(modes)
    assert not engine.model.network.training


def test_the_average_is_moved_by_its_decay_at_the_end_of_each_epoch(tiny_sd3, tmp_path):
    engine = Engine(tiny_config(tiny_sd3, tmp_path, update={"ema": 0.9}))
    wanted = {name: weight.double() for name, weight in engine.trainer.weights().items()}
    for epoch in (1, 2):
        rollout = engine.rollout(PROMPTS)
        assert (rollout.first_pair, rollout.pair_ids) == (4 * epoch - 4, list(range(4 * epoch - 4, 4 * epoch)))
        engine.update(rollout, REWARDS)
        wanted = {name: 0.9 * wanted[name] + 0.1 * now.double() for name, now in engine.trainer.weights().items()}
    moved = sum((now.double() - wanted[name]).norm() for name, now in engine.trainer.weights().items())
    off = sum((engine.ema[name].double() - average).norm() for name, average in wanted.items())
    assert off < 1e-4 * moved


def test_a_learning_rate_holds_for_one_step(engine, tiny_sd3, tmp_path):
    other = Engine(tiny_config(tiny_sd3, tmp_path / "other", optimizer={"lr": 5e-4}))
    for which, rate in ((engine, 5e-4), (other, None)):
        which.primitives.forward_backward(which.rollout(PROMPTS), rewards=REWARDS)
        which.primitives.optim_step(rate)
    assert_equal_bits(copy_of(engine), copy_of(other))
    assert engine.trainer.engine.optimizer.param_groups[0]["lr"] == 1e-3


def test_distance_is_that_of_the_latents(engine):
    rollout = engine.rollout(PROMPTS)
    every = torch.arange(4)
    ends = [rollout.latents(every, torch.full((4,), branch), torch.full((4,), 4)) for branch in (0, 1)]
    exact = ((ends[0].double() - ends[1].double()) / 2).square().flatten(1).mean(1).sqrt()
    assert torch.allclose(rollout.distance.double(), exact, rtol=1e-5)
    assert (rollout.distance > 0).all()


def test_stale_and_used_rollouts_are_refused(engine):
    first, second = engine.rollout(PROMPTS), engine.rollout(PROMPTS)
    for part in range(2):  # its own steps do not make a rollout stale
        engine.primitives.forward_backward(first, rewards=REWARDS, part=part)
        engine.primitives.optim_step()
    with pytest.raises(UsageError, match="sampled after 0 optimiser steps, the weights are now at 2"):
        engine.primitives.forward_backward(second, rewards=REWARDS)
    engine.primitives.forward_backward(second, rewards=REWARDS, allow_stale=True)


REFUSALS = [
    ({}, "takes one of rewards, advantages, weights; got none"),
    ({"rewards": REWARDS, "advantages": REWARDS}, "got rewards and advantages"),
    ({"rewards": REWARDS[:3]}, r"rewards: shape \[3, 2\]; takes \[4, 2\]: pair, branch"),
    ({"weights": torch.zeros(4, 2, 4)}, r"weights: shape \[4, 2, 4\]; takes \[4, 2, 2\]: pair, branch, step"),
    ({"weights": torch.full((4, 2, 2), NAN)}, "weights: hold a number that is not finite"),
    ({"rewards": REWARDS, "part": 2}, "part = 2: takes 0 to 1, of 2 parts"),
    ({"rewards": REWARDS, "parts": 3}, "parts = 3: takes a divisor of the 4 trained steps"),
    ({"rewards": REWARDS, "clip_range": 0.0}, "clip_range = 0.0"),
    ({"weights": torch.zeros(4, 2, 2), "clip_range": 0.1}, "and no weights"),
]


def test_refusals_change_nothing(engine):
    rollout, before = engine.rollout(PROMPTS), copy_of(engine)
    for arguments, message in REFUSALS:
        with pytest.raises(UsageError, match=message):
            engine.primitives.forward_backward(rollout, **arguments)
    with pytest.raises(UsageError, match="optim_step: there is no gradient"):
        engine.primitives.optim_step()
    engine.primitives.forward_backward(rollout, rewards=REWARDS, more=True)
    with pytest.raises(UsageError, match="optim_step: forward_backward said that more would come"):
        engine.primitives.optim_step()
    engine.primitives.forward_backward(rollout, rewards=REWARDS)
    with pytest.raises(UsageError, match="the gradient is complete; optim_step comes first"):
        engine.primitives.forward_backward(rollout, rewards=REWARDS)
    for rate in (-1.0, 0.0, float("inf"), NAN):
        with pytest.raises(UsageError, match=f"lr = {rate}"):
            engine.primitives.optim_step(rate)
    assert_equal_bits(before, copy_of(engine))


def test_amid_an_epoch_nothing_is_saved(engine):
    engine.primitives.forward_backward(engine.rollout(PROMPTS), rewards=REWARDS)
    engine.primitives.optim_step()
    with pytest.raises(UsageError, match="end_epoch comes first"):
        engine.save()
    engine.end_epoch()
    assert engine.save().name == "epoch_000001"
