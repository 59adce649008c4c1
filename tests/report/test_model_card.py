"""The card beside an export: a reader, and the hub, must be able to tell what it is."""

import json

import pytest
import yaml
from tiny_sd3 import tiny_config

from fdfo_engine.report.model_card import MAX_ROWS, base_licence, model_card


def front_matter(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.fixture
def config(tiny_sd3, tmp_path):
    rewards = [{"name": "clip", "weight": 0.5, "dtype": "bfloat16"}, {"name": "brightness", "weight": -1.0}]
    return tiny_config(tiny_sd3, tmp_path / "run", rewards=rewards)


def record(config, name, rows):
    folder = config.run.dir
    with open(f"{folder}/{name}", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_run_through_the_interface_has_no_curve(config, tmp_path):
    front, body = front_matter(model_card(config, 3, whole=False))
    assert front["base_model"] == config.model.id
    assert front["license"] == "other"
    assert "lora" in front["tags"]
    assert "A LoRA of rank 4, alpha folded in, for" in body
    assert "| clip | 0.5 | dtype: bfloat16 |" in body
    assert "| brightness | -1 |  |" in body
    assert "Not recorded" in body
    assert yaml.safe_load(body.split("```yaml")[1].split("```")[0])["lora"]["rank"] == 4
    assert "lora" not in front_matter(model_card(config, 3, whole=True))[0]["tags"]


def test_the_curve_is_the_runs_up_to_the_exported_epoch(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/prompts.sha256").write_text("abc123")
    record(config, "metrics.jsonl", [{"epoch": i, "reward_mean": i / 10} for i in range(1, 41)])
    card = model_card(config, 30, whole=False)
    rows = [line for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == MAX_ROWS
    assert (rows[0], rows[-1]) == ("| 1 | 0.1 |", "| 30 | 3 |")
    assert "`abc123`" in card
    record(config, "evaluations.jsonl", [{"epoch": i, "reward": 2.0 + i, "reward_stderr": 0.25} for i in (0, 20, 40)])
    assert "| 20 | 22 | 0.25 |" in model_card(config, 30, whole=False)
    assert "| 40 |" not in model_card(config, 30, whole=False)
    record(config, "evaluations.jsonl", [{"epoch": 0, "reward": None, "reward_stderr": None}])
    assert "| 0 | no opinion | no opinion |" in model_card(config, 30, whole=False)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\nlicense: other\nlicense_name: own\n---\n", "own"),
        ("# x", None),
        ("---\\nlicense: [a, b]\\n---\\n", None),
        ("---\\nlicense: : [\\n---\\n", None),
    ],
)
def test_the_licence_is_the_base_models(tmp_path, card, licence):
    (tmp_path / "README.md").write_text(card)
    found = base_licence(str(tmp_path))
    assert found == licence if licence else found.startswith("not known")
    assert base_licence("Qwen/Qwen-Image") == "apache-2.0"
