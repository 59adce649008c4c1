"""What a user reads when a config is wrong: place, key, value, what it takes."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdfo_engine.config import Config, ConfigError, bundled_configs, dump_config, load_config
from fdfo_engine.config.key_help import all_keys

LEAVES = [h for h in all_keys() if (h.default or h.required) and "*" not in h.key]
SCHEDULES = {"raw": {}, "prior": {"weight": 1.0}, "interval": {}}
FULL = {"model.train", "lora"}


def nested(key: str, value: object, variant: str | None = None) -> dict:
    """`{section: {...: value}}` with what the section needs besides."""
    parts = key.split(".")
    tree: object = value
    for part in reversed(parts[1:]):
        tree = {part: tree}
    required = {"run": {"dir": "runs/x"}, "model": {"id": "m"}, "prompts": {"source": "p.txt"}}
    if key.startswith("sampling.churn.") and variant:
        leaf = {} if parts[-1] == "schedule" else {"schedule": variant}
        tree = {"churn": leaf | SCHEDULES[variant] | tree["churn"]}
    if key.startswith("algorithm.") and variant:
        tree = {"name": variant} | tree
    return {parts[0]: required.get(parts[0], {}) | tree if isinstance(tree, dict) else tree}


def identity(help_) -> str:
    return f"{help_.key}[{help_.variant}]" if help_.variant else help_.key


@pytest.mark.parametrize("help_", LEAVES, ids=identity)
def test_slip_names_true_key(help_, complaint):
    section, _, leaf = help_.key.rpartition(".")
    for i in range(len(leaf)):
        slip = leaf[:i] + leaf[i + 1 :]
        text = complaint(nested(f"{section}.{slip}" if section else slip, 1, help_.variant))
        assert help_.key in text, text


def test_slip_in_reward_names_true_key(complaint):
    for leaf, other in (("name", {"weight": 1.0}), ("weight", {"name": "a"})):
        for i in range(len(leaf)):
            slip = leaf[:i] + leaf[i + 1 :]
            text = complaint({"rewards": [{slip: 1.0, **other}]})
            assert f"rewards.0.{leaf}: missing" in text
            assert f"{slip!r} a slip" in text


WRONG = {"text": "fast", "list": [[1]], "mapping": {"a": 1}, "null": None, "true": True, "number text": "3"}


def accepts(help_, kind: str) -> bool:
    takes = help_.takes
    return (
        ("null" in takes and kind == "null")
        or ("text" in takes.split() and "list" not in takes and kind in ("text", "number text"))
        or ("true" in takes and kind == "true")
    )


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("help_", LEAVES, ids=identity)
def test_wrong_type_names_key_value_and_kind(help_, kind, complaint):
    if accepts(help_, kind):
        return
    text = complaint(nested(help_.key, WRONG[kind], help_.variant))
    assert help_.key in text
    if not help_.key.endswith(("schedule", "algorithm.name", "deepspeed", "rewards")):
        assert f"takes {help_.takes}" in text


@pytest.mark.parametrize(
    ("written", "number"),
    [("3e-5", 3e-5), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0), ("+2.5E-3", 2.5e-3), ("010", 10.0), ("0x10", 16.0)],
)
def test_numbers_of_yaml_12(written, number, load):
    text = dump_config(load()).replace("lr: 3.0e-05", f"lr: {written}")
    for config in (load(text), load("", f"optimizer.lr={written}")):
        assert config.optimizer.lr == number
        assert type(config.optimizer.lr) is float


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "1:30", "1_000", "2026-01-01", "0b1"])
def test_words_of_yaml_11_are_text(word, load, complaint):
    assert load("", f"model.negative_prompt={word}").model.negative_prompt == word
    assert f'log.wandb = "{word}": takes true or false' in complaint("", f"log.wandb={word}")


def test_leading_zero_is_decimal(load):
    assert load("", "sampling.steps=010", "update.optimizer_steps=1").sampling.steps == 10


def test_numbers_must_be_of_their_kind(complaint):
    assert "remove the quotes" in complaint("", "sampling.steps='8'")
    assert "run.dir = 2024: takes non-empty text; quote it" in complaint("", "run.dir=2024")
    assert "takes a whole number" in complaint("", "sampling.steps=8.0")
    assert "model.fused = " in complaint("", "model.fused=0")


BROKEN = {
    "tab": ("model:\n\tid: x\n", "c.yaml:2:1: a tab cannot", "\\tid: x"),
    "bracket": ("model: [1\nlog: 2\n", "c.yaml:2:4: ", "log: 2"),
    "quote": ('model:\n  id: "x\n', "c.yaml:3:1: ", ""),
    "empty": ("", "c.yaml: no keys; start from a file under configs/", ""),
    "comments": ("# nothing\n---\n", "c.yaml: no keys", ""),
    "list": ("- a\n- b\n", "c.yaml:1: takes sections such as `run:`, this is a list", ""),
    "scalar": ("hello\n", "c.yaml:1: takes sections", ""),
    "twice": ("log: {}\nlog: {}\n", "c.yaml:2 log: given twice; it stands in line 1", ""),
    "twice inside": ("log:\n  wandb: true\n  wandb: true\n", "c.yaml:3 log.wandb: given twice", ""),
    "alias": ("a: &x [1]\nb: *x\n", "c.yaml:2:4: aliases", "b: *x"),
    "tag": ("log: !!python/object:os.system {}\n", "c.yaml:1 log: the tag !!python", ""),
    "number key": ("1: 2\n", "c.yaml:1 a key must be a text", ""),
    "bytes": (b"log:\n  \xff\xfe\n", "c.yaml:2: no UTF-8 text", ""),
    "control": ("log:\n  \x01\n", "c.yaml:2: character '\\x01'", ""),
    "deep": ("[" * 5000, "c.yaml: lists or mappings nested too deeply", ""),
    "big int": (f"run: {{seed: {'9' * 5000}}}\n", "c.yaml:1 run.seed: is no int that can be read", ""),
    "two documents": ("log: {}\n---\nrun: {}\n", "c.yaml:2:1: ", "---"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_shown_where(name, complaint, tmp_path):
    content, start, line = BROKEN[name]
    if not content:
        (tmp_path / "c.yaml").touch()
        with pytest.raises(ConfigError, match="no keys; start from a file under configs/"):
            load_config(tmp_path / "c.yaml")
        return
    text = complaint(content)
    assert start in text
    assert line in text


def test_byte_order_mark_is_no_key(load):
    assert load(b"\xef\xbb\xbf" + dump_config(load()).encode()) == load()


def test_all_problems_at_once_with_lines(load, complaint):
    text = dump_config(load()).replace("lr: 3.0e-05", "lrr: 1").replace("steps: 40", "steps: 0")
    message = complaint(text, "log.wandb=maybe", "model.hight=8", "run")
    lines = text.splitlines()
    assert message.startswith("5 problems in the settings:")
    assert f"c.yaml:{lines.index('  lrr: 1') + 1} optimizer.lrr: unknown key; did you mean optimizer.lr?" in message
    assert f"c.yaml:{lines.index('  steps: 0') + 1} sampling.steps = 0: takes a whole number >= 1" in message
    assert 'override log.wandb = "maybe": takes true or false' in message
    assert "override model.hight: unknown key; did you mean model.height?" in message
    assert "override run: takes section.key=value" in message


def test_key_of_another_section_is_found(complaint):
    assert "did you mean optimizer.lr?" in complaint({"lr": 1.0})
    assert "did you mean update.clip_range?" in complaint({"sampling": {"clip_range": 0.1}})
    assert "takes run, model, lora" in complaint({"qqqq": 1})


def test_missing_keys_are_named(complaint):
    message = complaint("log: {}\n")
    for key in ("run.dir", "model.id", "prompts.source", "rewards"):
        assert f"{key}: missing; takes" in message


def test_section_with_everything_commented_out_has_defaults(load):
    assert load({"optimizer": None}) == load()


def test_rewards_list(complaint, load):
    assert "rewards = []: takes a non-empty list" in complaint({"rewards": []})
    assert 'rewards = ["a"]' in complaint({"rewards": ["a"]})
    assert "rewards.0.weight: is 0" in complaint({"rewards": [{"name": "a", "weight": 0}]})
    both = complaint({"rewards": [{"name": "a", "weight": "x"}, {"name": "", "weight": 1}]})
    assert 'rewards.0.weight = "x"' in both
    assert 'rewards.1.name = "": takes non-empty text' in both
    config = load({"rewards": [{"name": "a", "weight": -2, "url": "http://h/x", "max_tokens": 3}]})
    assert config.rewards[0].model_extra == {"url": "http://h/x", "max_tokens": 3}


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"rewards": [{"name": "a", "weight": 1, "api_key": "sk-SECRET99"}]}, "rewards.0.api_key"),
        ({"rewards": [{"name": "a", "weight": 1, "apiKey": "SECRET99"}]}, "rewards.0.apiKey"),
        (
            {"rewards": [{"name": "a", "weight": 1, "headers": {"X-Api-Key": "SECRET99"}}]},
            "rewards.0.headers.X-Api-Key",
        ),
        ({"rewards": [{"name": "a", "weight": 1, "list": [{"password": "SECRET99"}]}]}, "rewards.0.list.0.password"),
        ({"rewards": [{"name": "a", "weight": 1, "hint": "sk-SECRET99x"}]}, "rewards.0.hint"),
        ({"rewards": [{"name": "https://me:SECRET99@host/x", "weight": 1}]}, "rewards.0.name"),
        ({"api_key": "SECRET99"}, "api_key"),
        ({"log": {"token": "SECRET99"}}, "log.token"),
        ({"log": {"wandb": "sk-SECRET99"}}, "log.wandb"),
        ({"log": {"wandb_thing": "SECRET99"}}, "log.wandb_thing"),
    ],
)
def test_secret_is_refused_and_never_shown(tree, key, complaint):
    message = complaint(tree)
    assert key in message
    assert "SECRET99" not in message
    assert "FDFO_REWARD_KEY" in message or key.startswith("log.wandb")


def test_secret_in_override_or_broken_line_is_never_shown(complaint):
    for override in ("rewards.0.api_key=SECRET99", "api_key SECRET99", "--token=SECRET99", "log.password=[SECRET99"):
        assert "SECRET99" not in complaint("", override)
    message = complaint('log:\n  api_key: "SECRET99\n  x: [\n')
    assert "SECRET99" not in message


def test_secret_is_not_in_a_traceback(load):
    with pytest.raises(ConfigError) as caught:
        load({"rewards": [{"name": "a", "weight": 1, "api_key": "SECRET99"}]})
    assert caught.value.__suppress_context__
    assert "SECRET99" not in str(caught.value.__context__)


BOUNDED = [h for h in LEAVES if any(sign in h.takes for sign in ("<", ">")) and h.key != "optimizer.betas"]


def within(takes: str, value: float) -> bool:
    words = takes.split()
    compare = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}
    signs = [(compare[w], float(words[i + 1])) for i, w in enumerate(words) if w in compare]
    return math.isfinite(value) and all(check(value, bound) for check, bound in signs)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(help_=st.sampled_from(BOUNDED), data=st.data())
def test_bounds(help_, data, tmp_path):
    whole = "whole" in help_.takes
    floats = st.floats(-10, 10) | st.sampled_from([math.inf, -math.inf, math.nan, 0.0, 1.0, -0.0, 1e300, -5e-324])
    value = data.draw(st.integers(-(2**70), 2**70) | st.integers(-3, 12) if whole else floats)
    ok = within(help_.takes, float(value)) and ("multiple of 8" not in help_.takes or value % 8 == 0)
    if whole and help_.key.endswith("seed"):
        ok = 0 <= value < 2**64
    tree = yaml.safe_load(Path(bundled_configs()["sd35m_combined"]).read_text().replace("e-", ".0e-"))
    for section, keys in nested(help_.key, value, help_.variant).items():
        tree[section] = tree.get(section, {}) | keys
    file = tmp_path / "bounds.yaml"
    file.write_text(yaml.safe_dump(tree))
    complaint = complaint_about(file)
    rules = ("multiple of update", "more than sampling.steps", "must divide sampling.pairs_per_epoch")
    agrees = any(rule in complaint for rule in rules)  # a rule, not a bound
    assert ok == (not complaint or agrees), (help_.key, value, complaint)
    assert help_.key in complaint or not complaint


def complaint_about(file: Path) -> str:
    try:
        load_config(file)
    except ConfigError as error:
        return str(error)
    return ""


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"shape: no such file \(/.*did you mean shapes\?.*sd35m_combined, .*shapes"):
        load_config("shape")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b" " * (2 << 20))
    with pytest.raises(ConfigError, match="a config is a text file"):
        load_config(big)


@pytest.mark.parametrize("name", sorted(bundled_configs()))
def test_shipped_configs_load_by_name_and_by_path(name):
    config = load_config(name)
    assert config == load_config(bundled_configs()[name])
    assert config.run.dir == f"runs/{name}"


def test_a_file_wins_over_a_bundled_name(load, tmp_path, monkeypatch):
    (tmp_path / "shapes").write_text(dump_config(load()))
    monkeypatch.chdir(tmp_path)
    assert load_config("shapes") == load()


def test_exit_code():
    assert ConfigError(["x"]).exit_code == 2
    assert str(ConfigError(["x"])) == "x"


def test_settings_are_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().optimizer.lr = 1.0


def test_imports_no_torch():
    code = (
        "import sys, fdfo_engine.config as c; c.load_config('shapes'); c.describe_keys();"
        "sys.exit(' '.join({'torch', 'numpy', 'deepspeed', 'diffusers'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_key_has_a_meaning():
    keys = all_keys()
    assert {h.key for h in keys} >= set(Config.model_fields)
    assert [h.key for h in keys if not h.meaning] == []
