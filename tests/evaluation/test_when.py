"""When a run evaluates, and which of its checkpoints is best: on logs and settings that are made by hand."""

import json
from types import SimpleNamespace

import pytest
import torch

from fdfo_engine.config import load_config
from fdfo_engine.runtime.best_checkpoint import read_best
from fdfo_engine.runtime.run_folder import checkpoint_store
from fdfo_engine.training.evaluating import Evaluations, _is_due, _lacks_evaluation, finished_epoch


def configured(folder, *overrides):
    return load_config("shapes", [f"run.dir={folder}", "run.epochs=10", *overrides])


@pytest.mark.parametrize(("every", "due"), [(4, [0, 4, 8, 10]), (5, [0, 5, 10]), (1, list(range(11))), (0, [])])
def test_every_so_many_epochs_and_after_the_last(tmp_path, every, due):
    config = configured(tmp_path, f"evaluation.every={every}")
    assert [epoch for epoch in range(11) if _is_due(config, epoch)] == due


def evaluated(folder, *epochs):
    lines = [json.dumps({"epoch": epoch, "reward": 0.5, "metrics": {}}) for epoch in epochs]
    (folder / "evaluations.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_an_epoch_lacks_its_evaluation_where_the_log_ends_before_it(tmp_path):
    config = configured(tmp_path)
    assert _lacks_evaluation(config, 0)
    evaluated(tmp_path, 0, 4)
    assert [_lacks_evaluation(config, epoch) for epoch in (3, 4, 5)] == [False, False, True]


def saved(folder, *epochs):
    for epoch in epochs:
        checkpoint_store(folder, keep=9).save(f"epoch_{epoch:06d}", {"w": {"a": torch.ones(1)}}, {"epoch": epoch})


@pytest.mark.parametrize(
    ("epochs", "seen", "overrides", "finished"),
    [
        ((), (), (), 0), ((9,), (0, 9), (), 0), ((10,), (0, 10), (), 10), ((10,), (0, 8), (), 0),
        ((12,), (0, 12), (), 12),
        ((10,), (), ("evaluation.every=0",), 10), ((10,), (0, 10), ("evaluation.guard.action=stop",), 0),
        ((10,), (0, 10), ("evaluation.guard.action=warn",), 10),
    ],
)  # fmt: skip
def test_a_run_is_finished_where_nothing_is_left_to_train_or_to_evaluate(tmp_path, epochs, seen, overrides, finished):
    saved(tmp_path, *epochs)
    evaluated(tmp_path, *seen)
    assert finished_epoch(configured(tmp_path, "evaluation.every=5", *overrides)) == finished


@pytest.mark.parametrize(("reward", "best"), [(0.49, None), (0.5, None), (0.51, "epoch_000005"), (float("nan"), None)])
def test_best_is_what_beats_the_untrained_model(tmp_path, reward, best):
    saved(tmp_path, 5)
    evaluated(tmp_path, 0)
    engine = SimpleNamespace(config=configured(tmp_path), epoch=5)
    Evaluations._note_best(SimpleNamespace(_engine=engine), {"reward": reward, "reward_stderr": 0.1})
    found = read_best(tmp_path)
    assert (found and found.name) == best
    engine.epoch = 6
    Evaluations._note_best(SimpleNamespace(_engine=engine), {"reward": 0.9, "reward_stderr": 0.1})
    assert read_best(tmp_path) == found, "no checkpoint holds what was evaluated"
