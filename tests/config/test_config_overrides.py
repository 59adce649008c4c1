"""`section.key=value`, and settings written back to text."""

import pytest
import yaml

from fdfo_engine.config import ConfigError, PriorChurn, RawChurn, dump_config, load_config
from fdfo_engine.config.dump import RESUMABLE_KEYS
from fdfo_engine.config.yaml_source import CoreDumper, read_yaml


def test_values_follow_the_rules_of_the_file(load):
    config = load("", "model.revision=null", "lora.targets=[to_q, to_k]", "log={wandb: true}")
    assert config.model.revision is None
    assert config.lora.targets == ("to_q", "to_k")
    assert config.log.wandb


def test_empty_value_is_null(load, complaint):
    assert load("", "update.ema=0.9", "update.ema=").update.ema is None
    assert "optimizer.lr = null" in complaint("", "optimizer.lr=")


def test_equals_sign_in_a_value(load):
    assert load("", "rewards.0.url=http://h/?a=b").rewards[0].model_extra == {"url": "http://h/?a=b"}


def test_list_items_by_index(load, complaint):
    assert load("", "rewards.0.weight=2").rewards[0].weight == 2.0
    assert load(dump_config(load()), "optimizer.betas.0=0.5").optimizer.betas == (0.5, 0.999)
    assert "override rewards.3.weight: rewards has no item 3 (1 in all, from 0)" in complaint("", "rewards.3.weight=1")
    assert "override rewards.x.weight: rewards has no item x" in complaint("", "rewards.x.weight=1")


def test_last_one_wins_and_sections_go_before_their_keys(load):
    assert load("", "optimizer.lr=1", "optimizer.lr=2").optimizer.lr == 2
    optimizer = load("", "optimizer.lr=1", "optimizer={lr: 2, eps: 1e-6}").optimizer
    assert (optimizer.lr, optimizer.eps) == (1, 1e-6)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lr", "takes section.key=value"),
        ("=3", "takes section.key=value"),
        ("optimizer..lr=3", "takes section.key=value"),
        ("--optimizer.lr=3", "given without dashes"),
        ("optimizer.lr.x=3", "optimizer.lr is no section"),
        ("optimizer.betas=[0.9", "expected ',' or ']'"),
        ("optimizer={lr: 1, lr: 2}", "given twice"),
        ("optimizer=3", "optimizer = 3: takes a mapping"),
    ],
)
def test_broken_override(override, says, complaint, load):
    text = dump_config(load())
    message = complaint(text, override)
    assert message.startswith("override ")
    assert says in message


def test_a_new_schedule_clears_the_old_ones_keys(load, complaint):
    text = dump_config(load())
    prior = "sampling.churn.schedule=prior"
    assert "sampling.churn.weight: missing; takes a number > 0" in complaint(text, prior)
    for overrides in ((prior, "sampling.churn.weight=0.5"), ("sampling.churn.weight=0.5", prior)):
        assert load(text, *overrides).sampling.churn == PriorChurn(schedule="prior", weight=0.5)
    assert load(text, "sampling.churn.schedule=interval").sampling.churn.weight == 1.0
    same = load(text, "sampling.churn.weight=0.1", "sampling.churn.schedule=raw")
    assert same.sampling.churn == RawChurn(weight=0.1)
    assert load("", "sampling.churn.weight=0.1").sampling.churn == RawChurn(weight=0.1)
    assert "did you mean prior?" in complaint(text, "sampling.churn.schedule=pryor")
    assert "sampling.churn.mu: unknown key" in complaint(text, "sampling.churn.mu=1")


ROUND_TRIP = [
    (),
    ("model.train=full", "run.seed=18446744073709551615", "update.ema=0.99"),
    ("model.negative_prompt='3e-5'", "model.revision='010'", "run.dir=ünï/ç: d"),
    (
        "model.negative_prompt='no'",
        "model.revision='1:30'",
        "rewards.0.note='~'",
        "rewards.0.x=[1e-7, null, {a: true}]",
    ),
    ("sampling.churn.schedule=interval", "sampling.block_pairs=7", "zero.deepspeed.comms_logger.enabled=true"),
    ("optimizer.lr=1e-300", "optimizer.eps=1e300", "lora.targets=[a, b]", "model.fused=false"),
]


@pytest.mark.parametrize("overrides", ROUND_TRIP)
def test_dump_loads_back(overrides, load):
    overrides = [o if o != "run.dir=ünï/ç: d" else "run.dir='ünï/ç: d'" for o in overrides]
    config = load("", *overrides)
    text = dump_config(config)
    assert load(text) == config
    assert yaml.safe_load(text) == read_yaml(text, "x").value, "readable by any YAML reader"


def test_dump_has_every_key(load):
    tree = yaml.safe_load(dump_config(load()))
    assert list(tree) == list(type(load()).model_fields)
    assert tree["optimizer"] == {
        "lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["3e-5", "1e3", "0o7", "010", "no", "~", "", ".5", "1.", ".inf", "-", "a: b", "#x", "'"]
)
def test_dumper_quotes_what_would_not_stay_text(text):
    written = yaml.dump({"a": text}, Dumper=CoreDumper)
    assert read_yaml(written, "x").value == {"a": text}
    assert yaml.safe_load(written) == {"a": text}


def test_resumable_keys_exist(load):
    tree = yaml.safe_load(dump_config(load()))
    for key in RESUMABLE_KEYS:
        node = tree
        for part in key.split("."):
            node = node[part]


def test_same_run_in_two_texts(load, tmp_path):
    (tmp_path / "a.yaml").write_text(dump_config(load()))
    assert load_config(tmp_path / "a.yaml") == load()


def test_the_index_after_the_last_item_appends_one(load, complaint):
    config = load("", "rewards.1.name=brightness", "rewards.1.weight=-0.5")
    assert [(reward.name, reward.weight) for reward in config.rewards][1:] == [("brightness", -0.5)]
    assert "rewards has no item 2 (1 in all, from 0)" in complaint("", "rewards.2.name=brightness")
    assert "rewards.1.name" in complaint("", "rewards.1.weight=2"), "an item without its name is an item amiss"


@pytest.mark.parametrize("key", ["run..dir", ".run", "run.", "", "run dir", "run.epochs=3", 3, None, ("run", "dir")])
def test_a_key_of_a_mapping_is_a_dotted_name(key):
    with pytest.raises(ConfigError, match=r"takes section\.key as its name"):
        load_config("shapes", {"run.dir": "x", key: 1})
