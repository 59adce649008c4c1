"""Blocks, shares and items of an epoch, on any number of ranks."""

import math

import pytest

from fdfo_engine.config import BatchPlan, ConfigError
from fdfo_engine.config.batch import auto_block_pairs

WORLDS = range(1, 33)


@pytest.mark.parametrize(("pairs", "block"), [(432, 12), (48, 12), (7, 7), (13, 1), (26, 2), (12, 12), (1, 1), (25, 5)])
def test_auto_block_is_the_largest_small_divisor(pairs, block):
    assert auto_block_pairs(pairs) == block
    assert block == max(d for d in range(1, 13) if pairs % d == 0)


@pytest.mark.parametrize("pairs", [1, 7, 12, 13, 48, 50, 432])
@pytest.mark.parametrize("block", ["auto", 1, 5, 12, 1000])
def test_every_pair_is_sampled_once_or_the_ranks_are_refused(pairs, block, load):
    config = load({"sampling": {"pairs_per_epoch": pairs, "block_pairs": block}})
    single = BatchPlan.from_config(config, 1)
    for world in WORLDS:
        if single.num_blocks < world:
            check_refusal(load, config, world, single)
            continue
        plan = BatchPlan.from_config(config, world)
        shares = [plan.blocks_of_rank(rank) for rank in range(world)]
        assert [b for share in shares for b in share] == list(range(plan.num_blocks))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert (plan.block_pairs, plan.num_blocks) == (single.block_pairs, single.num_blocks), "never from the ranks"
        assert str(plan.num_blocks) in plan.describe()


def check_refusal(load, config, world, single):
    with pytest.raises(ConfigError) as caught:
        BatchPlan.from_config(config, world)
    message = str(caught.value)
    pairs, block = single.pairs_per_epoch, single.block_pairs
    assert f"ceil({pairs} / {block}) = {single.num_blocks} block" in message
    assert f"for {world} ranks" in message
    sampling = config.sampling.model_dump()
    fixed = int(message.split("sampling.pairs_per_epoch = ")[2].split(",")[0])
    BatchPlan.from_config(load({"sampling": {**sampling, "pairs_per_epoch": fixed}}), world)
    if pairs >= world:
        size = int(message.split("sampling.block_pairs = ")[2].split()[0])
        BatchPlan.from_config(load({"sampling": {**sampling, "block_pairs": size}}), world)
        assert math.ceil(pairs / (size + 1)) < world, "the largest that works"
    else:
        assert "or less" not in message
    BatchPlan.from_config(config, single.num_blocks)


def test_numbers_of_the_paper(load):
    plan = BatchPlan.from_config(load(), 4)
    assert (plan.num_blocks, plan.block_pairs, plan.images_per_epoch) == (36, 12, 864)
    assert plan.items_per_optimizer_step == 2 * 432 * 40 // 4 == 8640
    assert plan.sampling_evaluations == plan.training_evaluations == 864 * 40
    assert plan.evaluations_per_epoch == 2 * 864 * 40
    assert plan.micro_batch == 24
    assert plan.describe() == (
        "an epoch: 432 pairs = 864 images, 40 steps each\n"
        "blocks: 36 of 12 pairs; 9 a rank on 4 ranks\n"
        "optimizer steps: 4 of 8640 items = 2 * 432 pairs * 40 trained steps / 4\n"
        "micro-batches: 24 items, about 90 a rank and step\n"
        "model evaluations an epoch: 34560 sampling + 34560 training = 69120"
    )


def test_guidance_kl_and_trained_steps_count(load):
    overrides = ["sampling.guidance_scale=4", "update.kl_weight=0.1", "update.train_steps=20", "update.micro_batch=5"]
    plan = BatchPlan.from_config(load("", *overrides), 1)
    assert plan.sampling_evaluations == 864 * 40 * 2
    assert plan.training_evaluations == 864 * 20 * 2 * 2
    assert (plan.trained_steps, plan.items_per_optimizer_step, plan.micro_batch) == (20, 4320, 5)


@pytest.mark.parametrize(
    ("algorithm", "looks"),
    [
        ("fdfo", 40), ("flow_grpo", 40), ("awm", 60), ("nft", 60), ("ablation", 40),
        ("ablation algorithm.states=renoised", 60),
    ],
)  # fmt: skip
def test_an_algorithm_that_noises_again_runs_the_model_once_more_for_each_trained_step(load, algorithm, looks):
    plan = BatchPlan.from_config(load("", *f"algorithm.name={algorithm} update.train_steps=20".split()), 1)
    assert plan.sampling_evaluations == 864 * looks
    assert plan.training_evaluations == 864 * 20


@pytest.mark.parametrize("term", ["update.kl_weight", "update.velocity_hinge"])
def test_each_term_that_looks_at_the_base_runs_it_too(load, term):
    config = load("", f"{term}=0.1")
    assert config.update.needs_base
    assert BatchPlan.from_config(config, 1).training_evaluations == 2 * 864 * 40
    assert not load().update.needs_base


def test_a_short_last_block_is_told(load):
    plan = BatchPlan.from_config(load("", "sampling.pairs_per_epoch=50", "sampling.block_pairs=12"), 2)
    assert "5 of 12 pairs, the last one of 2; 2 or 3 a rank on 2 ranks" in plan.describe()


def test_ranges_are_checked(load):
    plan = BatchPlan.from_config(load(), 2)
    for call in (lambda: plan.blocks_of_rank(2), lambda: plan.blocks_of_rank(-1)):
        with pytest.raises(ValueError, match="takes 0 to"):
            call()
    with pytest.raises(ValueError, match="world_size = 0"):
        BatchPlan.from_config(load(), 0)
