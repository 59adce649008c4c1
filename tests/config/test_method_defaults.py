"""The numbers of docs/METHOD.md, written out: no default moves without a test that says so."""

import pytest

from fdfo_engine.config import load_config

PINNED = {
    "sampling.pairs_per_epoch": 432, "sampling.steps": 40, "sampling.guidance_scale": 1.0,
    "sampling.pairs_per_prompt": 1, "sampling.embedded_guidance": None,
    "sampling.churn.schedule": "raw", "sampling.churn.weight": 0.0025,
    "model.height": 512, "model.width": 512, "model.train": "lora", "model.dtype": "bfloat16", "model.quantize": None,
    "lora.rank": 32, "lora.alpha": 64.0, "lora.targets": "family",
    "update.optimizer_steps": 4, "update.train_steps": None, "update.clip_range": 0.03, "update.kl_weight": 0.0,
    "update.velocity_hinge": 0.0, "update.ema": None, "update.subset": "random", "update.max_bad_pairs": 0.05,
    "optimizer.lr": 3e-5, "optimizer.betas": (0.9, 0.999), "optimizer.eps": 1e-8, "optimizer.weight_decay": 1e-4,
    "optimizer.max_grad_norm": 1.0,
    "algorithm.name": "fdfo", "algorithm.keep_share": 1.0, "algorithm.importance_share": 1.0,
    "algorithm.branch_noise": "independent", "algorithm.advantage_scale": "none",
    "run.seed": 0, "run.epochs": 100, "run.deterministic": False, "prompts.dedup": False,
    "evaluation.every": 10, "evaluation.count": 64, "evaluation.guard.action": "off",
    "evaluation.guard.max_drift": 1.0, "evaluation.guard.reward_drop": 2.0, "evaluation.guard.patience": 2,
    "checkpoint.every": 10, "checkpoint.keep": 2, "zero.stage": 1, "kernels.backend": "auto",
}  # fmt: skip
SCHEDULES = {
    "interval": {"mu": 1.0, "sigma": 1.5, "weight": 1.0, "soft_sigma": 0.25},
    "prior": {"weight": 0.1, "weight_sigma": 0.0},
}


def value(config, dotted):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture
def defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run: {dir: r}\nmodel: {id: m}\nprompts: {source: p}\nrewards: [{name: brightness, weight: 1.0}]\n")
    return lambda *overrides: load_config(file, overrides)


@pytest.mark.parametrize("key", PINNED)
def test_a_default_is_the_methods(defaults, key):
    found = value(defaults(), key)
    assert (type(found), found) == (type(PINNED[key]), PINNED[key])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedules_defaults_are_the_methods(defaults, schedule):
    given = ["sampling.churn.weight=0.1"] if schedule == "prior" else []
    churn = defaults(f"sampling.churn.schedule={schedule}", *given).sampling.churn
    assert {key: getattr(churn, key) for key in SCHEDULES[schedule]} == SCHEDULES[schedule]


def test_the_papers_reward_is_the_combined_one():
    rewards = {reward.name: reward.weight for reward in load_config("sd35m_combined").rewards}
    assert rewards == {"pickscore": 1.0, "vlm_alignment": 0.1}
