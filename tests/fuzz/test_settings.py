"""Configs and overrides that nobody would write: settings, or the words of a `ConfigError`; no secret is echoed."""

import random

import pytest
import yaml
from fuzz.mutating import HOSTILE, mutations_of

from fdfo_engine.config import BatchPlan, Config, ConfigError, dump_config, load_config
from fdfo_engine.config.key_help import all_keys
from fdfo_engine.config.load import bundled_configs

FEW, MANY = range(12), range(12, 400)
KEYS = sorted({help_.key.replace("*", "0") for help_ in all_keys()})
PARTS = ["run", "0", "", "rewards", "x y", "-", "é"]
TEXTS = ["", "[", "{", "9" * 5000, "1e999", "!!python/object:os.system", "&a *a", "\t", "'", "- -", ": :"]
SECRET = "Zq7vRt2LxW9pKd4M"
SECRETS = [
    f"sk-{SECRET}", f"=sk-{SECRET}", f"hf_{SECRET}", f"ghp_{SECRET}", f"https://me:{SECRET}@host/v1",
    f"https://{SECRET}@host/v1", f"https://host/v1?api_key={SECRET}", f"https://host/v1?x=1&token={SECRET}#a",
    f"postgres://u:{SECRET}@h", f"Bearer {SECRET}", f"bearer {SECRET}", f'"sk-{SECRET}"', f"[sk-{SECRET}]",
    f"{{api_key: {SECRET}}}", f"a sk-{SECRET} b",
]  # fmt: skip
"""Values that are secrets, or hold one."""

SECRET_PLACES = ["rewards.0.url", "rewards.0.api_key", "model.id", "prompts.source", "log.webhook", "run.dirr", "q", ""]
ON_THE_COMMAND_LINE = ["{key}={secret}", "{key} {secret}", "--{key}={secret}", "{key}=[{secret}", "{key}: {secret}"]
IN_A_FILE = ["{key}: {secret}", "{key}:\n  - {secret}\n  x", "run: {{dir: x}}\n{key}: [{secret}", "{secret}"]


def loaded(file, overrides):
    """The settings, or None where they are refused in words; what is derived from them is asked for too."""
    try:
        config = load_config(file, overrides)
        BatchPlan.from_config(config, 2).describe()
    except ConfigError as error:
        return None, str(error)
    return config, ""


def random_override(rng):
    key = rng.choice(KEYS) if rng.random() < 0.8 else ".".join(rng.sample(PARTS, 2))
    value = rng.choice(HOSTILE)
    if rng.random() < 0.5:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n...\n")
    else:
        text = rng.choice(TEXTS)
    return f"{key}={text}"


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_a_damaged_config_is_settings_or_words(tmp_path, seeds):
    """What loads is written out and read again: it is the same."""
    shipped = [file.read_bytes() for file in bundled_configs().values()]
    file = tmp_path / "c.yaml"
    for seed in seeds:
        rng = random.Random(seed)
        data = rng.choice(mutations_of("c.yaml"))(rng.choice(shipped), rng)
        file.write_bytes(data)
        config, _ = loaded(file, [])
        if config is not None:
            file.write_text(dump_config(config))
            assert load_config(file) == config, data


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_a_wild_override_is_settings_or_words(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        overrides = [random_override(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        config, _ = loaded("shapes", overrides)
        assert config is None or isinstance(config, Config), overrides


@pytest.mark.parametrize("number", [10**400, 1 << 63, -(1 << 63), 10**18])
@pytest.mark.parametrize("key", KEYS)
def test_a_huge_number_is_settings_or_words(key, number):
    config, message = loaded("shapes", [f"{key}={number}"])
    assert config is not None or key.split(".")[0] in message


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_refused_and_never_echoed(tmp_path, secret):
    file = tmp_path / "c.yaml"
    for key in SECRET_PLACES:
        for form in ON_THE_COMMAND_LINE:
            text = form.format(key=key, secret=secret)
            config, message = loaded("shapes", [text])
            assert SECRET not in message, (text, message)
            assert config is None, text
        for form in IN_A_FILE:
            file.write_text(form.format(key=key, secret=secret))
            _, message = loaded(file, [])
            assert SECRET not in message, (form, message)
