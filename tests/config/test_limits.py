"""The least and the largest value of every number among the settings, and what lies just beyond."""

import pytest

from fdfo_engine.config import load_config
from fdfo_engine.config.schema import AUTO_MICRO_BATCH

TINY = "1e-30"
LIMITS = {  # taken; refused
    "run.seed": (("0", "18446744073709551615"), ("-1", "18446744073709551616")),
    "run.epochs": (("1",), ("0",)),
    "model.height": (("8", "24"), ("0", "4", "20")),
    "model.width": (("8", "24"), ("0", "4", "20")),
    "model.max_sequence_length": (("0", "512"), ("-1", "513")),
    "model.prompt_cache_gib": ((TINY,), ("0",)),
    "model.few_steps": (("1", "false"), ("0", "true")),
    "lora.rank": (("1",), ("0",)),
    "lora.alpha": ((TINY,), ("0",)),
    "prompts.count": (("1",), ("0",)),
    "sampling.pairs_per_epoch": (("1",), ("0",)),
    "sampling.pairs_per_prompt": (("1",), ("0",)),
    "sampling.steps": (("4", "10000"), ("0", "10001")),
    "sampling.guidance_scale": (("0", "30"), ("-0.1",)),
    "sampling.embedded_guidance": (("0", "null"), ("-0.1",)),
    "sampling.block_pairs": (("1", "auto"), ("0",)),
    "sampling.churn.weight": (("0",), (f"-{TINY}",)),
    "algorithm.keep_share": ((TINY, "1"), ("0", "1.001")),
    "algorithm.importance_share": ((TINY, "1"), ("0", "1.001")),
    "update.optimizer_steps": (("1",), ("0",)),
    "update.train_steps": (("4", "null"), ("0", "10001")),
    "update.micro_batch": (("1", "auto"), ("0",)),
    "update.clip_range": ((TINY,), ("0", "-0.03", ".nan", ".inf")),
    "update.kl_weight": (("0",), ("-0.1", ".inf")),
    "update.velocity_hinge": (("0",), ("-0.1",)),
    "update.ema": ((TINY, "0.9999", "null"), ("0", "1")),
    "update.max_bad_pairs": (("0", "1"), ("-0.1", "1.001")),
    "optimizer.lr": ((TINY,), ("0",)),
    "optimizer.betas": (("[0, 0]", "[0.9999, 0.9999]"), ("[1, 0]", "[0, 1]", "[-0.1, 0]", "[0.9]")),
    "optimizer.eps": ((TINY,), ("0",)),
    "optimizer.weight_decay": (("0",), ("-0.1",)),
    "optimizer.max_grad_norm": ((TINY,), ("0",)),
    "zero.stage": (("0", "3"), ("-1", "4")),
    "evaluation.every": (("0",), ("-1",)),
    "evaluation.count": (("1",), ("0",)),
    "evaluation.batch": (("1",), ("0",)),
    "evaluation.seed": (("0", "18446744073709551615"), ("-1", "18446744073709551616")),
    "evaluation.guard.max_drift": ((TINY,), ("0",)),
    "evaluation.guard.reward_drop": ((TINY,), ("0",)),
    "evaluation.guard.patience": (("1",), ("0",)),
    "checkpoint.every": (("1",), ("0",)),
    "checkpoint.keep": (("2",), ("1", "0")),
    "comm.timeout_s": (("5",), ("4.9",)),
    "log.images_every": (("0",), ("-1",)),
    "labels.round_size": (("1", "1024"), ("0", "1025")),
    "labels.keep.of": (("1", "16"), ("0", "17")),
    "labels.repeats": (("0", "0.5"), ("-0.1", "0.501")),
    "labels.comparison": (("1", "1024"), ("0", "1025")),
    "labels.strip": (("0", "16"), ("-1", "17")),
}
OF_VARIANTS = {
    "sampling.churn.schedule=prior": {
        "sampling.churn.weight": ((TINY,), ("0",)),
        "sampling.churn.weight_sigma": (("0",), ("-0.1",)),
    },
    "sampling.churn.schedule=interval": {
        "sampling.churn.weight": (("0",), ("-0.1",)),
        "sampling.churn.sigma": (("0",), ("-0.1",)),
        "sampling.churn.soft_sigma": ((TINY,), ("0",)),
    },
    "algorithm.name=flow_grpo": {"algorithm.noise": ((TINY, "1.4"), ("0", "1.41"))},
    "algorithm.name=awm": {"algorithm.noise": (("0", "1.4"), ("-0.1", "1.41"))},
    "algorithm.name=nft": {
        "algorithm.noise": (("0", "1.4"), ("-0.1", "1.41")),
        "algorithm.reach": ((TINY, "1"), ("0", "1.01")),
        "algorithm.advantage_clip": ((TINY,), ("0",)),
    },
}
CASES = [
    *(("", key, limits) for key, limits in LIMITS.items()),
    *((kind, key, limits) for kind, keys in OF_VARIANTS.items() for key, limits in keys.items()),
]
NEEDED = {  # so that nothing but the key itself can be at fault
    "sampling.churn.weight_sigma": ["sampling.churn.weight=0.1"],
    "update.train_steps": ["sampling.steps=10000"],
}


@pytest.mark.parametrize(("kind", "key", "limits"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_a_number_ends_where_it_is_said_to(load, complaint, kind, key, limits):
    beside = [*([kind] if kind else []), *NEEDED.get(key, [])]
    taken, refused = limits
    for given in taken:
        load("", *beside, f"{key}={given}")
    for given in refused:
        assert key in complaint("", *beside, f"{key}={given}")


def test_a_rewards_weight_is_any_number_but_0(load, complaint):
    for weight in ("-1.0", "1.0e-30"):
        load("", f"rewards=[{{name: brightness, weight: {weight}}}]")
    assert "such a reward has no effect" in complaint("", "rewards=[{name: brightness, weight: 0.0}]")
    assert "kill_after_s" in complaint("", "rewards=[{name: brightness, kill_after_s: 0}]")


def test_auto_stands_for_24_items():
    assert AUTO_MICRO_BATCH == 24
    assert load_config("shapes", ["run.dir=x", "update.micro_batch=auto"]).update.micro_batch_items == 24
