"""The numbers of docs/METHOD.md, written out: no default moves without a test that says so."""

import pytest
from pydantic import BaseModel

from fdfo_engine.config import load_config
from fdfo_engine.rewards.registry import find

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
OTHERS = {
    "model.revision": None, "model.variant": None, "model.family": "auto", "model.few_steps": "auto",
    "model.fused": "auto", "model.attention": "auto", "model.gradient_checkpointing": False, "model.compile": False,
    "model.cuda_graphs": False, "model.max_sequence_length": 256, "model.negative_prompt": "",
    "model.prompt_cache": "auto", "model.prompt_cache_gib": 20.0,
    "prompts.column": "prompt", "prompts.allow_download": False, "prompts.comments": False, "prompts.count": 2048,
    "sampling.block_pairs": "auto", "sampling.overlap_scoring": True,
    "update.micro_batch": "auto", "update.kl_reference": None,
    "zero.gather_rollout": "auto", "zero.offload_optimizer": False, "zero.offload_parameters": False,
    "zero.deepspeed": {},
    "evaluation.prompts": None, "evaluation.batch": 32, "evaluation.seed": 0, "evaluation.metrics": (),
    "evaluation.health": ("saturation", "clipped", "sharpness", "edge_density", "checkerboard", "grid_energy"),
    "evaluation.guard.bands": {},
    "comm.timeout_s": 600.0,
    "log.tensorboard": True, "log.wandb": False, "log.images_every": 10, "log.webhook": None,
    "kernels.tune": True, "kernels.require": False,
    "labels.question": "Which image is better?", "labels.tie": "I would be equally happy with either.",
    "labels.round_size": 48, "labels.keep.of": 2, "labels.keep.by": "distance", "labels.scale": "none",
    "labels.repeats": 0.05, "labels.comparison": 50, "labels.strip": 3,
}  # fmt: skip
"""What METHOD says nothing of: a run that leaves a key out means this."""

PINNED |= OTHERS
GIVEN = {"run.dir", "model.id", "prompts.source", "rewards"}
ALGORITHMS = {
    "flow_grpo": {"noise": 0.7, "advantage_clip": 5.0},
    "awm": {"noise": 0.4, "advantage_clip": 5.0},
    "nft": {"noise": 0.0, "reach": 1.0, "advantage_clip": 5.0},
    "ablation": {"states": "own", "direction": "pair", "pairing": "one_noise"},
}
OPTIONS = {
    "http": {"timeout_s": 60.0, "give_up_after_s": 600.0, "concurrency": 8, "ask_first": True, "batch_size": 8},
    "vlm_alignment": {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct", "dtype": "bfloat16", "target": "Yes", "contrast": "No",
        "question": 'Does this image match the caption "{prompt}"? Answer Yes or No.', "least_mass": 0.01,
        "image_size": 504, "preprocess": "processor", "batch_size": 8, "device": "auto",
    },
    "vlm_quality": {"question": "Does this image look like the work of a professional? Answer Yes or No."},
    "vlm_photorealism": {"question": "Does this image look like a real photograph? Answer Yes or No."},
    "vlm_server": {"timeout_s": 60.0, "give_up_after_s": 600.0, "concurrency": 8, "top_logprobs": 20, "extra": {}},
    "pickscore": {"model": "yuvalkirstain/PickScore_v1", "dtype": "float32", "batch_size": 16},
    "geneval": {"score": "fraction", "threshold": 0.3, "count_threshold": 0.3, "overlap": 0.5, "batch_size": 8},
    "ocr": {"threads": 1},
    "person": {"replay": None, "tolerance": 0.01},
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


def leaves(section, prefix=""):
    """Dotted names of all keys of a section that are no sections."""
    for name in type(section).model_fields:
        below = getattr(section, name)
        yield from leaves(below, f"{prefix}{name}.") if isinstance(below, BaseModel) else [prefix + name]


def test_every_key_has_its_default_written_here(defaults):
    assert set(leaves(defaults())) - GIVEN == PINNED.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithms_defaults_are_written_here(defaults, name):
    assert defaults(f"algorithm.name={name}").algorithm.model_dump() == {"name": name} | ALGORITHMS[name]


def test_a_reward_counts_once_as_it_is_and_takes_its_time(defaults):
    (reward,) = defaults("rewards=[{name: brightness}]").rewards
    assert (reward.weight, reward.normalize, reward.kill_after_s) == (1.0, "none", None)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_rewards_options_have_these_defaults(name):
    fields = find(name, "rewards.0.name").Options.model_fields
    assert {key: fields[key].default for key in OPTIONS[name]} == OPTIONS[name]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedules_defaults_are_the_methods(defaults, schedule):
    given = ["sampling.churn.weight=0.1"] if schedule == "prior" else []
    churn = defaults(f"sampling.churn.schedule={schedule}", *given).sampling.churn
    assert {key: getattr(churn, key) for key in SCHEDULES[schedule]} == SCHEDULES[schedule]


def test_the_papers_reward_is_the_combined_one():
    rewards = {reward.name: reward.weight for reward in load_config("sd35m_combined").rewards}
    assert rewards == {"pickscore": 1.0, "vlm_alignment": 0.1}
