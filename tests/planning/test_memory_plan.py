"""The memory of an epoch against sums by hand, and the micro-batch that is chosen."""

import dataclasses
from pathlib import Path

import pytest

from fdfo_engine.config import BatchPlan, load_config
from fdfo_engine.planning.footprint import Footprint, Line
from fdfo_engine.planning.memory import GIB, MICRO_BATCHES, choose_micro_batch, predict
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime.errors import UsageError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "sd35m_combined.yaml"
VELOCITY = 2 * 16 * 64 * 64
IMAGE = 4 * 3 * 512 * 512
MEDIUM = Footprint(
    frozen=5 * GIB, trained=4 * 18_000_000, trained_values=18_000_000, other=GIB // 5, text=11 * GIB,
    forward=Line(0, 50 << 20), training=Line(4 * 18_000_000, int(2.4 * GIB)), decode=Line(0, GIB),
    velocity=VELOCITY, image=IMAGE,
)  # fmt: skip


def config(*overrides):
    return load_config(CONFIG, overrides)


def of(settings, ranks, micro_batch=24, footprint=MEDIUM):
    plan = dataclasses.replace(BatchPlan.from_config(settings, ranks), micro_batch=micro_batch)
    return predict(footprint, settings, plan)


def test_parts_by_hand():
    found = of(config(), 4)
    assert found.resident["optimizer"] == 16 * 18_000_000 // 4
    assert found.update["trajectories"] == VELOCITY * 216 * 40, "432 pairs over 4 ranks are 216 images each"
    assert found.rollout["trajectories"] == found.update["trajectories"]
    assert found.rollout["block"] == 24 * (VELOCITY * 40 + IMAGE)
    assert found.update["images"] == 216 * IMAGE
    assert found.update["micro-batch"] == 4 * 18_000_000 + 24 * int(2.4 * GIB)
    assert found.update["gradient exchange"] == 4 * 18_000_000
    assert found.rollout["network or VAE"] == 4 * GIB, "four images are decoded at once"
    assert found.peak == sum(found.resident.values()) + sum(found.update.values())
    assert found.needed > found.peak


def test_final_latents_that_are_noised_again_are_kept_in_float32():
    found = of(config("algorithm.name=awm"), 4)
    assert found.update["trajectories"] == 216 * (VELOCITY * 40 + 4 * 16 * 64 * 64)


def test_the_fullest_rank_counts():
    settings = config("sampling.pairs_per_epoch=60")  # five blocks of 12
    assert of(settings, 2).update["images"] == 2 * 36 * IMAGE


@pytest.mark.parametrize(("stage", "optimizer", "frozen"), [(0, 8, 1), (1, 4, 1), (2, 4, 1), (3, 4, 4)])
def test_stages(stage, optimizer, frozen):
    found = of(config(f"zero.stage={stage}"), 4)
    assert found.resident["optimizer"] == optimizer * 18_000_000
    assert found.resident["frozen weights"] == 5 * GIB // frozen
    assert bool(found.update["gathered weights"]) == (stage == 3)


def test_guidance_doubles_the_network_and_kl_adds_the_base():
    plain, guided = of(config(), 1), of(config("sampling.guidance_scale=4"), 1)
    assert guided.update["micro-batch"] - plain.update["micro-batch"] == 24 * int(2.4 * GIB)
    assert of(config("update.kl_weight=0.1"), 1).update["base model"] == 24 * (50 << 20)
    full = config(
        "model.train=full", "zero.stage=2", "update.kl_weight=0.1", "update.kl_reference=frozen_copy", "lora=null"
    )
    assert of(full, 4).resident["frozen copy"] == 5 * GIB + 4 * 18_000_000, "whole on every rank"


def test_the_host_takes_what_is_offloaded():
    here = of(config("zero.stage=3"), 4)
    found = of(config("zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"), 4)
    names = "optimizer", "frozen weights", "trained weights"
    assert {name: found.host[name] for name in names} == {name: here.resident[name] for name in names}
    assert all(found.resident[name] == 0 for name in names)
    assert found.update == here.update
    one = of(config("zero.stage=3", "zero.offload_parameters=true"), 1)
    assert one.update["gathered weights"] > 0, "one rank gathers from the host"
    assert "host: 0.27 GiB (optimizer" in of(config("zero.offload_optimizer=true"), 1).describe()


def test_loading_and_evaluation_are_phases():
    whole, split = of(config(), 4), of(config("zero.stage=3"), 4)
    weights = MEDIUM.frozen + MEDIUM.trained
    assert sum(whole.loading.values()) == 0
    assert split.loading["whole weights"] == pytest.approx(weights - weights // 4, abs=4)
    large = dataclasses.replace(MEDIUM, forward=Line(0, GIB))
    wide = of(config("evaluation.batch=100", "sampling.guidance_scale=2"), 1, footprint=large)
    assert wide.evaluation["network or VAE"] == 200 * GIB
    assert wide.peak == sum(wide.resident.values()) + 200 * GIB
    assert of(config("evaluation.every=0", "evaluation.batch=100"), 1, footprint=large).peak < 200 * GIB
    averaged = of(config("update.ema=0.9"), 1)
    assert averaged.evaluation["weights that the average replaces"] == MEDIUM.trained


def test_reward_models_are_counted_by_their_type_and_place():
    def size(*overrides):
        return WeightedRewards.from_config(config(*overrides).rewards).gpu_bytes()

    clip_h, qwen = 986_109_441, 8_292_166_656
    assert size() == (4 * clip_h + 2 * qwen, [])
    assert size("rewards.0.dtype=bfloat16", "rewards.1.device=cpu") == (2 * clip_h, [])
    assert size("rewards.0.model=some/other") == (2 * qwen, ["pickscore"])
    scorers, plan = 3 * GIB, BatchPlan.from_config(config(), 1)
    assert predict(MEDIUM, config(), plan, scorers).peak - predict(MEDIUM, config(), plan).peak == scorers


def test_text_encoders_lie_beside_the_network_before_a_rollout():
    small = dataclasses.replace(MEDIUM, text=GIB)
    large = dataclasses.replace(MEDIUM, text=100 * GIB)
    assert of(config(), 1, footprint=small).peak == of(config(), 1, footprint=MEDIUM).peak
    found = of(config(), 1, footprint=large)
    assert found.peak == sum(found.resident.values()) + 100 * GIB


@pytest.mark.parametrize("gib", [24, 48, 80, 141])
def test_auto_is_the_largest_that_fits_for_any_number_of_ranks(gib):
    settings, free = config(), gib * GIB
    chosen = choose_micro_batch(MEDIUM, settings, 1, free).micro_batch
    assert of(settings, 1, chosen).needed <= free
    larger = [size for size in MICRO_BATCHES if size > chosen]
    assert all(of(settings, 1, size).needed > free for size in larger)
    for ranks in (2, 4, 36):
        found = choose_micro_batch(MEDIUM, settings, ranks, free)
        assert (found.micro_batch, found.ranks) == (chosen, ranks)


def test_where_one_rank_cannot_the_real_number_decides():
    settings = config("sampling.pairs_per_epoch=4320")  # trajectories of 42 GiB
    assert choose_micro_batch(MEDIUM, settings, 8, 40 * GIB).micro_batch > 1
    with pytest.raises(UsageError, match=r"sampling.block_pairs, update.micro_batch or evaluation.batch"):
        choose_micro_batch(MEDIUM, settings, 1, 40 * GIB)


def test_a_given_micro_batch_stays_although_it_does_not_fit():
    found = choose_micro_batch(MEDIUM, config("update.micro_batch=100"), 1, 24 * GIB)
    assert found.micro_batch == 100
    assert found.needed > 24 * GIB
