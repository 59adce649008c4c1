"""What an update does with ties, with nothing to learn, and with gradients that are not numbers."""

import pytest
import torch
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.runtime.errors import NumericsError

NAN = float("nan")
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])


@pytest.fixture
def engine(tiny_sd3, tmp_path):
    return Engine(tiny_config(tiny_sd3, tmp_path))


def copy_of(engine):
    return {**engine.trainer.weights(), **engine.trainer.state()}


def assert_equal_bits(one, other, *, but=()):
    assert one.keys() == other.keys()
    for name in one.keys() - set(but):
        assert torch.equal(one[name], other[name]), name


def norm(tensors):
    return torch.stack([t.double().norm() for t in tensors.values()]).norm().item()


def count_items(engine, monkeypatch):
    """Latents that went through the network since, as a list that grows."""
    seen = []
    velocity = engine.model.velocity

    def counting(network, latents, timesteps, conditioning):
        seen.append(len(latents))
        return velocity(network, latents, timesteps, conditioning)

    monkeypatch.setattr(engine.model, "velocity", counting)
    return seen


def test_ties_cost_nothing_and_still_count_in_the_mean(engine, tiny_sd3, tmp_path, monkeypatch):
    """One live pair of four: the gradient is a quarter of what it is alone."""
    alone = Engine(
        tiny_config(tiny_sd3, tmp_path / "b", sampling={"pairs_per_epoch": 1, "steps": 4, "block_pairs": 1,
                                                        "churn": {"schedule": "raw", "weight": 0.05}})
    )  # fmt: skip
    rewards = torch.tensor([[1.0, 0.0], [2.0, 2.0], [NAN, 0.0], [5.0, 5.0]])
    lone, four = alone.rollout(PROMPTS[:1]), engine.rollout(PROMPTS)
    seen = count_items(engine, monkeypatch)
    captured = {}
    for name, which in (("alone", alone), ("four", engine)):
        step = which.trainer.step

        def keep(name=name, which=which, step=step):
            captured.setdefault(name, which.trainer.gradients())
            return step()

        monkeypatch.setattr(which.trainer, "step", keep)
    alone.update(lone, rewards[:1])
    metrics = engine.update(four, rewards)
    assert sum(seen) == 2 * 4  # both branches of one pair at all four steps
    assert (metrics["tied_pairs"], metrics["lost_pairs"], metrics["optimizer_steps"]) == (2, 1, 2)
    difference = {n: 4 * g - captured["alone"][n] for n, g in captured["four"].items()}
    assert norm(captured["alone"]) > 0
    assert norm(difference) < 1e-4 * norm(captured["alone"])


@pytest.mark.parametrize("lr", [1e-50, 1e-3])
def test_steps_that_change_no_weight_are_warned_of(tiny_sd3, tmp_path, capsys, lr):
    """AdamW's step is at most about lr, and 1e-50 is no float32: it moves not even a LoRA's zeros."""
    engine = Engine(tiny_config(tiny_sd3, tmp_path, optimizer={"lr": lr}))
    before = engine.trainer.weights()
    metrics = engine.update(engine.rollout(PROMPTS), REWARDS)
    has_changed = any(not torch.equal(w, before[name]) for name, w in engine.trainer.weights().items())
    assert metrics["optimizer_steps"] == 2
    assert metrics["weights_changed"] == has_changed == (lr == 1e-3)
    assert ("no weight has changed: at optimizer.lr = 1e-50" in capsys.readouterr().err) == (lr == 1e-50)


def test_nothing_to_learn_moves_nothing(engine):
    engine.update(engine.rollout(PROMPTS), REWARDS)  # moments that a further step would move weights by
    before = copy_of(engine)
    metrics = engine.update(engine.rollout(PROMPTS), torch.ones(4, 2))
    assert (metrics["optimizer_steps"], metrics["left_out_steps"], metrics["tied_pairs"]) == (0, 2, 4)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert_equal_bits(before, copy_of(engine))


def test_equal_images_move_nothing(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path, sampling={"churn": {"schedule": "raw", "weight": 0.0}})
    engine = Engine(config)
    before = copy_of(engine)
    metrics = engine.update(engine.rollout(PROMPTS), REWARDS)
    assert (metrics["zero_direction_pairs"], metrics["optimizer_steps"]) == (4, 0)
    assert_equal_bits(before, copy_of(engine))


def test_a_kl_term_pulls_even_where_all_tie(tiny_sd3, tmp_path):
    engine = Engine(tiny_config(tiny_sd3, tmp_path, update={"kl_weight": 1.0}))
    engine.update(engine.rollout(PROMPTS), REWARDS)
    metrics = engine.update(engine.rollout(PROMPTS), torch.ones(4, 2))
    assert metrics["optimizer_steps"] == 2
    assert metrics["kl"] > 0


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_full_training_is_still_held_to_the_untrained_model(tiny_sd3, tmp_path, stage):
    settings = {"model": {"train": "full"}, "update": {"kl_weight": 1.0, "kl_reference": "frozen_copy"}}
    config = tiny_config(tiny_sd3, tmp_path, zero={"stage": stage}, **settings)
    whole = Engine(config)
    whole.update(whole.rollout(PROMPTS), REWARDS)
    whole.save()
    resumed = Engine.resume(tmp_path)
    ties = torch.ones(4, 2)
    found, wanted = (engine.update(engine.rollout(PROMPTS), ties) for engine in (resumed, whole))
    assert found["kl"] == wanted["kl"] > 0
    assert_equal_bits(copy_of(whole), copy_of(resumed))


@pytest.mark.parametrize("stage", [0, 1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_a_gradient_that_is_no_number_is_dropped(tiny_sd3, tmp_path, monkeypatch, stage):
    """The first optimiser step of the second epoch is spoilt: as if it had not been, and all later ones as ever."""
    spoilt, clean = (Engine(tiny_config(tiny_sd3, tmp_path / n, zero={"stage": stage})) for n in ("a", "b"))
    for engine in (spoilt, clean):
        engine.update(engine.rollout(PROMPTS), REWARDS)
    before = copy_of(spoilt)
    assert_equal_bits(before, copy_of(clean))
    rollouts = [spoilt.rollout(PROMPTS), clean.rollout(PROMPTS)]

    backward, calls = spoilt.trainer.backward, []

    def poison(loss, *, last):
        calls.append(last)
        backward(loss * NAN if calls.count(True) <= 1 and last else loss, last=last)

    monkeypatch.setattr(spoilt.trainer, "backward", poison)
    dropped = []
    step = spoilt.trainer.step

    def watched():
        result = step()
        dropped.append(None if result[1] else copy_of(spoilt))
        return result

    monkeypatch.setattr(spoilt.trainer, "step", watched)
    metrics = spoilt.update(rollouts[0], REWARDS)
    assert (metrics["skipped_steps"], metrics["optimizer_steps"]) == (1, 1)
    assert_equal_bits(before, dropped[0])

    # the clean engine leaves the same share out; afterwards both must be the same to the bit
    monkeypatch.setattr(clean.trainer, "backward", lambda loss, *, last: None)

    def leave_out_first():
        monkeypatch.undo()
        return 0.0, False

    monkeypatch.setattr(clean.trainer, "step", leave_out_first)
    clean.update(rollouts[1], REWARDS)
    assert_equal_bits(copy_of(spoilt), copy_of(clean))


def test_ten_dropped_steps_in_a_row_stop_the_run(engine, monkeypatch):
    rollout = engine.rollout(PROMPTS)
    backward = engine.trainer.backward
    monkeypatch.setattr(engine.trainer, "backward", lambda loss, *, last: backward(loss * NAN, last=last))
    for _ in range(4):
        engine.update(rollout, REWARDS, allow_stale=True)
    with pytest.raises(NumericsError, match="10 optimiser steps in a row"):
        engine.update(rollout, REWARDS, allow_stale=True)


def test_velocities_move_toward_the_better_image_and_away_from_the_worse(engine):
    """The meaning of it all: v* = v_old - u is nearer afterwards for the winner of a pair, farther for its loser."""
    rollout = engine.rollout(PROMPTS)
    engine.update(rollout, REWARDS)
    rows = torch.arange(4).repeat_interleave(2)
    branch, step = torch.arange(2).repeat(4), torch.full((8,), 1)
    conditioning, _ = engine.sampler.conditioning(rollout.prompts, copies=2)
    with torch.no_grad():
        v = engine.model.velocity(
            engine.trainer, rollout.latents(rows, branch, step), rollout.timesteps[step], conditioning
        )
    target = -rollout.direction[rows] * (1 - 2 * branch).view(-1, 1, 1, 1)
    toward = ((v - rollout.velocities[rows, branch, step]) * target).flatten(1).mean(1)
    wins = torch.where(branch == 0, 1, -1) * (REWARDS[rows, 0] - REWARDS[rows, 1]).sign()
    assert (toward * wins).sum() > 0
    assert (toward * wins > 0).sum() >= 6


def test_an_applied_step_ends_the_count_of_dropped_ones(engine):
    """Nine dropped, one applied, nine dropped: no ten in a row. A tenth is."""
    for applied in [*[False] * 9, True, *[False] * 9, True, *[False] * 9]:
        engine._updater._count_skipped(applied)
    with pytest.raises(NumericsError, match="10 optimiser steps in a row"):
        engine._updater._count_skipped(False)
