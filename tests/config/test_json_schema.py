"""The published schemas, held to the code and to what they describe."""

import json
from pathlib import Path

import jsonschema_rs
import pytest

from fdfo_engine.cli import main, schema
from fdfo_engine.config import bundled_configs, config_schema
from fdfo_engine.config.yaml_source import read_yaml

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "schema"


@pytest.mark.parametrize("of", ["events", "config"])
def test_the_published_copy_is_what_the_verb_prints(of, capsys):
    assert main.main(["schema", of]) == 0
    printed = capsys.readouterr().out
    assert (PUBLISHED / f"{of}.json").read_text() == printed, f"fdfo schema {of} > docs/schema/{of}.json"
    jsonschema_rs.meta.validate(json.loads(printed))


@pytest.mark.parametrize("file", bundled_configs().values(), ids=lambda file: file.stem)
def test_every_bundled_config_is_valid(file):
    jsonschema_rs.validate(config_schema(), read_yaml(file.read_text(), file.name).value)


@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": {}},
        {"optimizer": {"lr": "fast"}},
        {"run": {"epochs": 3}},
        {"rewards": []},
        {"evaluation": {"metrics": [3]}},
        {"sampling": {"churn": {"schedule": "none"}}},
    ],
)
def test_what_a_config_may_not_be_is_not_valid(change):
    tree = read_yaml(bundled_configs()["shapes"].read_text(), "shapes").value
    assert not jsonschema_rs.is_valid(config_schema(), tree | change)


def test_an_unknown_schema_is_named(capsys):
    with pytest.raises(SystemExit):
        main.main(["schema", "nothing"])
    assert "events" in capsys.readouterr().err
    assert schema.text("events") != schema.text("config")
