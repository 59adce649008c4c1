"""Settings that are impossible together, and the keys handed on to DeepSpeed."""

import pytest

from fdfo_engine.config.cross_checks import RULES
from fdfo_engine.config.deepspeed_keys import ALLOWED, RESERVED

# of each rule: settings that break it, and what the message says of the way out; and their nearest legal neighbours
BREAKS = {
    "update.optimizer_steps": {
        "update.optimizer_steps=3": "nearest: 2, 4",
        "update.optimizer_steps=41": "nearest: 40",
        "update.train_steps=6 update.optimizer_steps=4": "nearest: 3, 6",
    },
    "update.train_steps": {
        "update.train_steps=44 update.optimizer_steps=4": "more than sampling.steps = 40",
        "sampling.steps=4 update.train_steps=5 update.optimizer_steps=5": "more than sampling.steps = 4",
    },
    "lora": {
        "model.train=full lora.rank=4": "remove the lora section",
        "model.train=full lora.alpha=2": "remove the lora section",
    },
    "zero.stage": {
        "model.train=full zero.stage=0": "set zero.stage to 1, 2 or 3",
        "model.train=full zero.stage=0 model.dtype=float16": "model.dtype = float16",
    },
    "update.kl_weight": {"model.train=full update.kl_weight=0.1": "set update.kl_reference: frozen_copy"},
    "update.velocity_hinge": {"model.train=full update.velocity_hinge=0.1": "set update.kl_reference: frozen_copy"},
    "update.kl_reference": {
        "update.kl_reference=frozen_copy": "set it to null",
        "update.kl_reference=frozen_copy model.train=full": "set it to null",
        "update.kl_reference=frozen_copy update.kl_weight=0.1": "set it to null",
    },
    "zero.offload_optimizer": {"zero.offload_optimizer=true zero.stage=0": "needs zero.stage 1, 2 or 3"},
    "zero.offload_parameters": {
        f"zero.offload_parameters=true zero.stage={stage}": f"as they are used; it is {stage}" for stage in (0, 1, 2)
    },
    "model.train": {
        f"model.train=full zero.offload_optimizer=true zero.stage={stage}": "set zero.stage to 3" for stage in (1, 2)
    },
    "model.quantize": {
        "model.quantize=nf4 zero.stage=3": "a stage below 3",
        "model.quantize=nf4 model.train=full": "take model.train: lora",
    },
    "model.fused": {"model.fused=true model.compile=true": "set one of them to false"},
    "model.compile": {"model.compile=true zero.stage=3": "lower zero.stage"},
    "evaluation.guard.action": {
        f"evaluation.guard.action={action} evaluation.every=0": "set evaluation.every" for action in ("stop", "warn")
    },
    "evaluation.guard.bands": {
        "evaluation.health=[] evaluation.guard.bands.clipped=[0.0,0.5]": "clipped is not among the measures",
        "evaluation.health=[clipped] evaluation.guard.bands.saturation=[0.0,0.5]": "saturation is not among",
    },
    "update.subset": {
        "update.subset=stratified update.train_steps=12": "a divisor of sampling.steps",
        "update.subset=stratified update.train_steps=16": "a divisor of sampling.steps",
    },
    "sampling.pairs_per_prompt": {"sampling.pairs_per_prompt=5": "must divide"},
    "sampling.churn": {
        f"algorithm.name={name} sampling.churn.weight=0.1": f"algorithm.name = {name} has noise of its own; remove it"
        for name in ("flow_grpo", "awm", "nft")
    },
    "model.max_sequence_length": {"model.id=shapes": "set model.max_sequence_length to 0"},
}
LEGAL = {
    "update.optimizer_steps": ["update.optimizer_steps=40", "update.train_steps=6 update.optimizer_steps=3"],
    "update.train_steps": ["update.train_steps=40", "sampling.steps=4 update.train_steps=4"],
    "lora": ["model.train=full", "lora.rank=4"],
    "zero.stage": [
        "model.train=full zero.stage=1", "zero.stage=0", "model.train=full zero.stage=0 model.dtype=float32",
    ],
    "update.kl_weight": [
        "model.train=full update.kl_weight=0", "update.kl_weight=0.1",
        "model.train=full update.kl_weight=0.1 update.kl_reference=frozen_copy",
    ],
    "update.velocity_hinge": [
        "model.train=full update.velocity_hinge=0", "update.velocity_hinge=0.1",
        "model.train=full update.velocity_hinge=0.1 update.kl_reference=frozen_copy",
    ],
    "update.kl_reference": [
        "update.kl_reference=frozen_copy update.kl_weight=0.1 model.train=full",
        "update.kl_reference=frozen_copy update.velocity_hinge=0.1 model.train=full",
    ],
    "zero.offload_optimizer": [f"zero.offload_optimizer=true zero.stage={stage}" for stage in (1, 2, 3)],
    "zero.offload_parameters": ["zero.offload_parameters=true zero.stage=3"],
    "model.train": [
        "model.train=full zero.offload_optimizer=true zero.stage=3",
        "model.train=full zero.offload_optimizer=true zero.stage=2 model.dtype=float32",
        "model.train=full zero.stage=2", "zero.offload_optimizer=true zero.stage=2",
    ],
    "model.quantize": ["model.quantize=nf4 zero.stage=2", "zero.stage=3"],
    "model.fused": ["model.fused=true", "model.compile=true", "model.fused=false model.compile=true"],
    "model.compile": ["model.compile=true zero.stage=2", "zero.stage=3"],
    "evaluation.guard.action": [
        "evaluation.guard.action=off evaluation.every=0", "evaluation.guard.action=stop evaluation.every=1",
    ],
    "evaluation.guard.bands": ["evaluation.health=[clipped] evaluation.guard.bands.clipped=[0.0,0.5]"],
    "update.subset": ["update.subset=stratified update.train_steps=20", "update.train_steps=12"],
    "sampling.pairs_per_prompt": ["sampling.pairs_per_prompt=12"],
    "sampling.churn": ["algorithm.name=flow_grpo", "sampling.churn.weight=0.1", "algorithm.name=nft"],
    "model.max_sequence_length": ["model.id=shapes model.max_sequence_length=0", "model.max_sequence_length=1"],
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.keys[0])
def test_rule_names_its_keys_and_the_fix(rule, complaint):
    for overrides, fix in BREAKS[rule.keys[0]].items():
        message = complaint("", *overrides.split())
        assert fix in message
        assert sum(key in message for key in rule.keys) >= 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.keys[0])
def test_rule_lets_its_neighbours_pass(rule, load):
    for overrides in LEGAL[rule.keys[0]]:
        load("", *overrides.split())


def test_rules_are_asked_beside_other_problems(complaint):
    message = complaint("", "update.optimizer_steps=3", "optimizer.lr=fast", "run.seed=-1")
    assert "3 problems" in message
    assert (
        "40 trained steps (sampling.steps) must be a multiple of update.optimizer_steps = 3; nearest: 2, 4" in message
    )


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 40, 41])
@pytest.mark.parametrize("train", [None, 1, 4, 6])
@pytest.mark.parametrize("optimizer_steps", [1, 2, 3, 4, 5, 9])
def test_divisibility(steps, train, optimizer_steps, load, complaint):
    overrides = [f"sampling.steps={steps}", f"update.optimizer_steps={optimizer_steps}"]
    overrides += [f"update.train_steps={train}"] if train else []
    trained = train or steps
    if trained % optimizer_steps == 0 and trained <= steps:
        load("", *overrides)
        return
    message = complaint("", *overrides)
    if trained % optimizer_steps:
        nearest = [int(n) for n in message.split("nearest: ")[1].splitlines()[0].split(", ")]
        assert nearest
        assert all(trained % n == 0 for n in nearest)
    if trained > steps:
        assert f"more than sampling.steps = {steps}" in message


def test_float32_may_train_whole_at_stage_0(load):
    load("", "model.train=full", "zero.stage=0", "model.dtype=float32")


def flat(keys, prefix=""):
    for key, kind in keys.items():
        yield from flat(kind, f"{prefix}{key}.") if isinstance(kind, dict) else [(prefix + key, kind)]


@pytest.mark.parametrize("key", [key for key, _ in flat(ALLOWED)])
def test_deepspeed_slip_names_true_key(key, complaint):
    section, _, leaf = key.rpartition(".")
    slip = f"{section}.{leaf[:-1]}" if section else leaf[:-1]
    message = complaint("", f"zero.deepspeed.{slip}=1")
    assert "unknown key; did you mean" in message
    assert leaf in message


GOOD = {
    "a whole number": ("5e8", 500_000_000),
    "true or false": ("true", True),
    "text": ("x", "x"),
    "a list": ("[a]", ["a"]),
    "a number": ("0.5", 0.5),
}


@pytest.mark.parametrize(("key", "kind"), flat(ALLOWED))
def test_deepspeed_key_is_kept_and_typed(key, kind, load, complaint):
    text, value = GOOD[kind]
    tree = load("", f"zero.deepspeed.{key}={text}").zero.deepspeed
    for part in key.split("."):
        tree = tree[part]
    assert tree == value
    assert isinstance(tree, bool) == (kind == "true or false")
    assert f"zero.deepspeed.{key}: takes {kind}" in complaint("", f"zero.deepspeed.{key}=null")


@pytest.mark.parametrize("key", RESERVED)
def test_deepspeed_reserved_key_is_refused(key, complaint):
    message = complaint("", f"zero.deepspeed.{key}=1")
    assert f"zero.deepspeed.{key}: set by fdfo; remove it ({RESERVED[key]})" in message


def test_deepspeed_misspelt_reserved_key(complaint):
    assert "did you mean zero_optimization?" in complaint("", "zero.deepspeed.zero_optimisation={}")
    message = complaint("", "zero.deepspeed.gradient_cliping=1")
    assert "did you mean gradient_clipping? That one is set by fdfo; remove it" in message
    assert "takes a mapping of" in complaint("", "zero.deepspeed.zero_optimization=3")
