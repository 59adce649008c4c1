"""Choices that a run keeps: read without a server, exported, given again as a reward, told in the report."""

import json
import re

import numpy as np
import pytest
import torch
from label.paired import PairedRun
from PIL import Image

from fdfo_engine.choices import summary
from fdfo_engine.choices.pick_a_pic import export_choices
from fdfo_engine.choices.store import read_choices
from fdfo_engine.cli import main
from fdfo_engine.config import dump_config
from fdfo_engine.report import write_report
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.rewards.registry import build
from fdfo_engine.runtime.errors import CheckpointError, RewardError, UsageError
from fdfo_engine.serve.backend import weighed_by_distance
from fdfo_engine.serve.faces.rounds import _REWARDS

CHOICES = ("left", "right", "tie", "skip")
PICK_A_PIC = {
    "are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_0_url",
    "image_1_uid", "image_1_url", "label_0", "label_1", "model_0", "model_1", "ranking_id", "user_id",
    "num_example_per_prompt",
}  # fmt: skip


def answer(run, name, pair, choice, rater="ann", **details):
    rewards = _REWARDS[choice]
    if choice in ("left", "right") and run.backend.shown(pair, rater) != (0, 1):
        rewards = rewards[::-1]
    opinion = {"pair": pair.pair, "rater": rater, "kind": "choice", "rewards": rewards}
    return run.backend.rounds.add_feedback(name, [opinion | {"details": {"choice": choice, **details}}])[0]


@pytest.fixture
def run(tmp_path):
    """Four pairs, one answer of each kind, one of them taken back and given again; a comparison of two."""
    run = PairedRun(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(run.backend.config))
    name = run.add_round(4)
    pairs = run.backend.rounds.pairs(name)
    run.backend.rounds.withdraw(name, answer(run, name, pairs[0], "right"))
    for pair, choice in zip(pairs, CHOICES, strict=True):
        answer(run, name, pair, choice, ms=1000, flips=1)
    compared = run.add_round(2, kind="compare")
    for pair in run.backend.rounds.pairs(compared):
        tuned = CHOICES[run.backend.shown(pair, "ann").index(1)]
        answer(run, compared, pair, tuned)
    yield run
    run.close()


def test_what_is_read_is_what_the_server_counts(run):
    judged = read_choices(run.folder)
    assert [each.choice.choice for each in judged] == ["right", *CHOICES, *[each.choice.choice for each in judged[5:]]]
    assert [each.choice.is_withdrawn for each in judged[:2]] == [True, False]
    own = [each.choice for each in judged if not each.choice.is_comparison]
    assert (summary(own, "ann").answers, summary(own, "ann").skips, summary(own, "ann").flips) == (3, 1, 4)
    counted = {str(c.pair): list(c.rewards) for c in own if not c.is_withdrawn and c.choice != "skip"}
    assert counted == run.backend.rewards_of("r1")


def test_a_folder_without_choices_or_with_a_damaged_store(tmp_path):
    with pytest.raises(UsageError, match="no choices"):
        read_choices(tmp_path)
    (tmp_path / "serve.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match="serve"):
        read_choices(tmp_path)


def test_jsonl_has_pick_a_pics_columns(run, capsys):
    out = run.folder / "choices.jsonl"
    assert main.main(["label", "--run", str(run.folder), "--export", str(out)]) == 0
    assert capsys.readouterr().out.startswith("5 choices")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(set(row) == PICK_A_PIC for row in rows)
    chosen, tie = rows[0], rows[2]
    judged = next(each for each in read_choices(run.folder) if each.choice.event == chosen["ranking_id"])
    assert chosen["best_image_uid"] == judged.images[judged.choice.preferred].stem
    assert (chosen["label_0"], chosen["label_1"]) == judged.choice.rewards
    assert (tie["label_0"], tie["label_1"], tie["has_label"]) == (0.5, 0.5, False)
    assert (rows[3]["model_0"], rows[3]["model_1"]) == ("base:shapes", "shapes@epoch_000000")


def test_parquet_has_the_images_too(run):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = run.folder / "choices.parquet"
    assert export_choices(read_choices(run.folder), "shapes", out) == 5
    table = parquet.read_table(out)
    assert set(table.column_names) == PICK_A_PIC | {"jpg_0", "jpg_1"}
    assert table["jpg_0"][0].as_py().startswith(b"\xff\xd8")


@pytest.mark.parametrize("name", ["choices.csv", "choices"])
def test_other_files_are_refused(run, name):
    with pytest.raises(UsageError, match="takes a name that ends in"):
        export_choices(read_choices(run.folder), "shapes", run.folder / name)


def test_an_image_that_is_gone_is_told(run):
    pytest.importorskip("pyarrow")
    run.image_file(run.backend.rounds.pairs("r1")[0].images[0]).unlink()
    with pytest.raises(CheckpointError):
        export_choices(read_choices(run.folder), "shapes", run.folder / "choices.parquet")


# ---- as a reward


def images_of(run, pair):
    return torch.stack([torch.from_numpy(np.array(Image.open(run.image_file(i)))) for i in pair.images])


def test_a_replay_gives_the_images_that_were_judged_what_was_said_of_them(run):
    reward = build("person", {"replay": str(run.folder)}, "rewards.0.name")
    reward.require_ready()
    pairs = run.backend.rounds.pairs("r1")
    images = torch.cat([images_of(run, pair) for pair in pairs]).permute(0, 3, 1, 2).float() / 255
    scores = reward(["a red circle"] * 8, images).view(4, 2)
    expected = run.backend.rewards_of("r1")
    for pair, row in zip(pairs, scores, strict=True):
        assert row.tolist() == pytest.approx(expected.get(str(pair.pair), [np.nan] * 2), nan_ok=True)
    assert reward(["another prompt"] * 8, images).isnan().all()
    assert reward(["a red circle"] * 8, (images + 0.05).clamp(0, 1)).isnan().all()


def test_without_a_page_or_a_replay_a_person_is_not_ready(tmp_path):
    with pytest.raises(RewardError, match="fdfo label"):
        build("person", {}, "rewards.0.name").require_ready()
    with pytest.raises(UsageError, match="no choices"):
        build("person", {"replay": str(tmp_path)}, "rewards.0.name").require_ready()


def test_the_others_without_one():
    rewards = WeightedRewards({"person": (1.0, lambda p, i: i), "b": (0.5, lambda p, i: i)}, normalize={"b": "std"})
    assert list(rewards.without(["person"]).rewards) == ["b"]


def test_weighing_by_distance_is_the_formula_of_the_advantage():
    """A = (r0 - r1) / 2, times min(1, d / median d)."""
    distances = {"1": 1.0, "2": 2.0, "3": 4.0}
    weighed = weighed_by_distance({"1": [1.0, 0.0], "2": [0.0, 1.0], "3": [0.5, 0.5]}, distances)
    advantages = {pair: (first - second) / 2 for pair, (first, second) in weighed.items()}
    assert advantages == {"1": 0.25, "2": -0.5, "3": 0.0}
    assert weighed_by_distance({"1": [1.0, 0.0]}, {"1": 0.0}) == {"1": [1.0, 0.0]}


# ---- in the report


def test_the_report_tells_raters_and_the_comparison(run):
    text = write_report(run.folder).read_text()
    told = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", text))
    assert "100% (95%: 34 to 100%) of the choices went to the trained one (2 to 0, 0 ties); sign test p = 0.5." in told
    assert "ann 3 1 1 50% (95%: 9 to 91%) none 0 1.0" in told
