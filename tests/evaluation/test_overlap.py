"""Prompts on both sides of a run are counted and told; sets that results are measured on are no training lists."""

import re
from pathlib import Path

import pytest
import yaml
from tiny_sd3 import PROMPTS, tiny_config, tiny_tree

from fdfo_engine.config import load_config
from fdfo_engine.evaluation.overlap import describe_overlap, warn_of_overlap, warn_of_trained
from fdfo_engine.loop import run
from fdfo_engine.rollout.prompt_sets import PROMPT_SETS, named_set


@pytest.mark.parametrize(
    ("trained", "held_out", "told"),
    [
        (["a cat", "a dog"], ["a bird"], None),
        (["a cat", "a dog"], ["a dog", "a bird", "a cat"], "2 of 3 evaluation prompts are trained on, such as 'a dog'"),
        (["A  Cat\u00a0here"], [" a cat here "], "1 of 1 evaluation prompts are trained on, such as ' a cat here '"),
        (["a cat"], ["a cat sitting", "cat"], None),
        ([], ["a cat"], None),
        (["x" * 200], ["x" * 200], f"1 of 1 evaluation prompts are trained on, such as '{'x' * 80}...'"),
    ],
)
def test_it_counts_and_shows_one(trained, held_out, told):
    assert describe_overlap(trained, held_out) == told


def tree_of(tiny_sd3, tmp_path, held_out=None):
    tree = tiny_tree(tiny_sd3, tmp_path / "run", run={"epochs": 1}, evaluation={"every": 1, "count": 4})
    if held_out is not None:
        (tmp_path / "held_out.txt").write_text("\n".join(held_out))
        tree["evaluation"]["prompts"] = str(tmp_path / "held_out.txt")
    return tree


@pytest.mark.parametrize(
    ("held_out", "told"),
    [
        (None, f"4 of 4 evaluation prompts are trained on, such as {PROMPTS[0]!r}"),
        (["a bird", PROMPTS[2].upper()], f"1 of 2 evaluation prompts are trained on, such as {PROMPTS[2].upper()!r}"),
        (["a bird", "a fish"], None),
    ],
)
def test_a_run_says_it_at_its_start(tiny_sd3, tmp_path, capsys, held_out, told):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree_of(tiny_sd3, tmp_path, held_out)))
    run(load_config(tmp_path / "config.yaml"))
    errors = capsys.readouterr().err
    assert errors.count("are trained on") == (told is not None)
    assert told is None or f"{told}: evaluations are not held out" in errors


def test_a_run_without_evaluations_says_nothing(tiny_sd3, tmp_path, capsys):
    warn_of_overlap(tiny_config(tiny_sd3, tmp_path), PROMPTS, PROMPTS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_sets_that_results_are_measured_on_are_told(tiny_sd3, tmp_path, capsys, name):
    warn_of_overlap(tiny_config(tiny_sd3, tmp_path, prompts={"source": name}), ["a"], ["b"])
    assert f"prompts.source = {name!r}: models are evaluated on this set" in capsys.readouterr().err


def test_the_training_list_that_the_page_names_is_of_the_training_split():
    page = (Path(__file__).resolve().parents[2] / "docs/PROMPTS.md").read_text()
    source = re.search(r'source: "(hub:[^"]+)"', page)[1]
    train, test = named_set(source, "caption"), PROMPT_SETS["pickscore"]
    assert (train.repo, train.column) == (test.repo, test.column)
    assert train.has("data/train-00000-of-00002-9bb0c4ca8ba9b6f6.parquet")
    others = ("test", "validation", "test_unique", "validation_unique")
    assert not any(train.has(f"data/{split}-00000-of-00001.parquet") for split in others)


def test_evaluating_a_run_on_its_training_prompts_is_told(tiny_sd3, tmp_path, capsys):
    config = tiny_config(tiny_sd3, tmp_path)
    warn_of_trained(config, ["a bird"])
    assert capsys.readouterr().err == ""
    warn_of_trained(config, ["a bird", PROMPTS[1]])
    assert f"1 of 2 evaluation prompts are trained on, such as {PROMPTS[1]!r}" in capsys.readouterr().err
    gone = tiny_config(tiny_sd3, tmp_path, prompts={"source": "/no/such/list.txt"})
    warn_of_trained(gone, ["a bird"])
    assert "can't be told: prompts.source = '/no/such/list.txt'" in capsys.readouterr().err
