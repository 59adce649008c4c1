"""What a user can get wrong, and the exit status and words it ends in; nothing is changed by it."""

import json
import shutil

import pytest
import torch
import yaml
from engine import pixel_rewards
from safetensors.torch import load, load_file
from tiny_sd3 import PROMPTS, build_tiny_sd3, tiny_config, tiny_tree

from fdfo_engine import Engine
from fdfo_engine.config import ConfigError, load_config
from fdfo_engine.loop import run
from fdfo_engine.runtime.errors import CheckpointError, UsageError, exit_code
from fdfo_engine.runtime.run_checkpoints import RunCheckpoints
from fdfo_engine.trajectory import Rollout

ONE_BLOCK = {"block_pairs": 4}  # is scored in one call
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])


@pytest.fixture
def attempt(tiny_sd3, tmp_path):
    """Runs the tiny config with overrides; returns exit status and message, as train.py would."""

    def attempt(*overrides, resume=False, reward=None, **sections):
        if reward:
            sections["rewards"] = [{"name": f"engine.pixel_rewards:{reward}", "weight": 1.0}]
        tree = tiny_tree(tiny_sd3, tmp_path / "run", **sections)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        try:
            run(load_config(tmp_path / "config.yaml", overrides), resume=resume)
        except Exception as error:  # noqa: BLE001 - its status is what is tested
            return exit_code(error), str(error)
        return 0, ""

    return attempt


def metrics(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("override", "status", "words"),
    [
        ("sampling.stepz=4", 2, ["stepz", "steps"]),
        ("sampling.steps=many", 2, ["sampling.steps", "many"]),
        ("sampling.churn.schedule=wild", 2, ["sampling.churn"]),
        ("model.id=/no/such/folder", 3, ["model.id", "/no/such/folder"]),
        ("model.height=40", 2, ["model.height = 40", "multiple of 4 up to 32"]),
        ("prompts.source=/no/such/file.txt", 4, ["prompts.source", "no such file"]),
        ("evaluation.prompts=/no/such/file.txt", 4, ["no such file"]),
        ("evaluation.metrics=[brightnes]", 2, ["evaluation.metrics.0.name = 'brightnes'", "did you mean 'brightness'"]),
        ("rewards.0.name=brightnes", 2, ["rewards.0.name", "did you mean 'brightness'"]),
        ("rewards.0.gamma=2", 2, ["gamma"]),
        ("lora.targets=[attention.q]", 2, ["lora.targets", "attention.q"]),
    ],
)
def test_a_wrong_setting_is_named(attempt, override, status, words):
    found, message = attempt(override)
    assert found == status, message
    for word in words:
        assert word in message


def test_steps_that_do_not_divide_are_refused_with_the_nearest(attempt):
    status, message = attempt("sampling.steps=40", "update.optimizer_steps=3")
    assert status == 2
    assert (
        "40 trained steps (sampling.steps) must be a multiple of update.optimizer_steps = 3; nearest: 2, 4" in message
    )


def test_lost_pairs_are_counted_and_up_to_the_limit_training_goes_on(attempt, tmp_path):
    assert (
        attempt(reward="blank_one_pair", update={"max_bad_pairs": 0.25}, sampling=ONE_BLOCK, run={"epochs": 2})[0] == 0
    )
    assert [row["lost_pairs"] for row in metrics(tmp_path)] == [1, 1]
    assert all(row["optimizer_steps"] == 2 for row in metrics(tmp_path))


def test_lost_pairs_over_the_limit_stop_the_run(attempt, tmp_path):
    status, message = attempt(reward="blank_one_pair", update={"max_bad_pairs": 0.2}, sampling=ONE_BLOCK)
    assert status == 5
    assert "1 of 4 pairs have no reward (update.max_bad_pairs = 0.2)" in message
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 5


def test_a_reward_that_always_fails_stops_even_where_all_may_be_lost(attempt):
    status, message = attempt(reward="never", update={"max_bad_pairs": 1.0})
    assert status == 5, message


def test_a_reward_without_any_preference_stops_after_three_epochs(attempt, tmp_path):
    status, message = attempt(reward="indifferent", run={"epochs": 10})
    assert status == 5
    assert "3 epochs in a row without a single opinion" in message
    assert len(metrics(tmp_path)) == 3


def test_a_reward_of_the_wrong_length_stops(attempt):
    status, message = attempt(reward="one_too_few")
    assert status == 5
    assert "returned 3 scores for 4 images" in message


def test_other_settings_in_the_same_folder_are_refused(attempt):
    assert attempt(run={"epochs": 1})[0] == 0
    status, message = attempt("optimizer.lr=0.5")
    assert status == 2
    assert "optimizer.lr" in message


def test_resume_insists(attempt):
    status, message = attempt(resume=True)
    assert status == 7
    assert "no checkpoint to resume from" in message


def corrupt(folder):
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(attempt, tmp_path, capsys):
    assert attempt(reward="left_bright", run={"epochs": 3})[0] == 0
    checkpoints = tmp_path / "run/checkpoints"
    wanted = load((checkpoints / "epoch_000003/weights.safetensors").read_bytes())  # load_file would map the file
    corrupt(checkpoints / "epoch_000003")
    assert attempt(reward="left_bright", run={"epochs": 3})[0] == 0
    output = capsys.readouterr()
    assert "epoch_000003 is damaged" in output.out + output.err
    again = load_file(checkpoints / "epoch_000003/weights.safetensors")
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert [row["epoch"] for row in metrics(tmp_path)] == [1, 2, 3]


def test_all_checkpoints_damaged_is_no_fresh_start(attempt, tmp_path):
    assert attempt(reward="left_bright", run={"epochs": 2})[0] == 0
    for folder in (tmp_path / "run/checkpoints").iterdir():
        corrupt(folder)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    status, message = attempt(reward="left_bright", run={"epochs": 3})
    assert status == 7
    assert "no usable checkpoint" in message
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_foreign_checkpoint_is_refused_before_anything_changes(tiny_sd3, tmp_path):
    Engine(tiny_config(tiny_sd3, tmp_path, lora={"rank": 4, "alpha": 64.0})).save()
    engine = Engine(tiny_config(tiny_sd3, tmp_path))
    before = engine.trainer.weights()
    with pytest.raises(CheckpointError, match=r"of another model\n  lora.alpha: 64.0 there, 8.0 given"):
        engine.load()
    assert all(torch.equal(w, before[n]) for n, w in engine.trainer.weights().items())


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    """The model's folder was replaced by another architecture since, and no record of it was kept."""
    build_tiny_sd3(tmp_path / "model")
    first = Engine(tiny_config(tmp_path / "model", tmp_path / "run", model={"train": "full"}))
    first.checkpoints = RunCheckpoints(first.config, None, {})
    first.save()
    shutil.rmtree(tmp_path / "model")
    build_tiny_sd3(tmp_path / "model", dual_attention_layers=())
    engine = Engine(tiny_config(tmp_path / "model", tmp_path / "run", model={"train": "full"}))
    with pytest.raises(CheckpointError, match=r"of another model: \d+ weights differ\n  .*there, absent here"):
        engine.load()


def test_the_library_saves_and_resumes(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run", update={"ema": 0.9})
    engine = Engine(config)
    for _ in range(2):
        engine.update(engine.rollout(PROMPTS), REWARDS)
    engine.save()
    resumed = Engine.resume(tmp_path / "run")
    assert (resumed.config, resumed.epoch, resumed.next_pair) == (config, 2, 8)
    for which in (engine, resumed):
        which.update(which.rollout(PROMPTS), REWARDS)
    for name in ("weights", "state"):
        one, other = (getattr(which.trainer, name)() for which in (engine, resumed))
        assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert all(torch.equal(engine.ema[key], resumed.ema[key]) for key in engine.ema)


def test_a_fresh_engine_does_not_save_over_a_run(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run")
    trained = Engine(config)
    trained.update(trained.rollout(PROMPTS), REWARDS)
    kept = trained.save()
    fresh = Engine(config)
    with pytest.raises(CheckpointError, match="holds epoch_000001, which this engine neither loaded nor saved"):
        fresh.save()
    assert [path.name for path in kept.parent.iterdir()] == ["epoch_000001"]
    fresh.load()
    fresh.save()


def test_resuming_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run there"):
        Engine.resume(tmp_path)


def test_a_rollout_is_good_for_one_update(tiny_sd3, tmp_path):
    engine = Engine(tiny_config(tiny_sd3, tmp_path))
    first, second = engine.rollout(PROMPTS), engine.rollout(PROMPTS)
    engine.update(first, REWARDS)
    with pytest.raises(UsageError, match="was trained on already"):
        engine.update(first, REWARDS)
    with pytest.raises(UsageError, match="sampled after 0 optimiser steps, the weights are now at 2"):
        engine.update(second, REWARDS)
    assert engine.update(second, REWARDS, allow_stale=True)["optimizer_steps"] == 2


@pytest.mark.parametrize("shape", [(4,), (3, 2), (2, 4)])
def test_rewards_of_another_shape_are_refused(tiny_sd3, tmp_path, shape):
    engine = Engine(tiny_config(tiny_sd3, tmp_path))
    with pytest.raises(UsageError, match=r"takes \[4, 2\]: pair, branch"):
        engine.update(engine.rollout(PROMPTS), torch.zeros(shape))


def test_a_stored_rollout_trains_the_same(tiny_sd3, tmp_path):
    """Scored later, in another process: the same weights to the bit."""
    direct, later = (Engine(tiny_config(tiny_sd3, tmp_path / name)) for name in ("a", "b"))
    direct.update(direct.rollout(PROMPTS), REWARDS)
    later.rollout(PROMPTS).save(tmp_path / "rollout")
    loaded = Rollout.load(tmp_path / "rollout")
    assert loaded.prompts == list(PROMPTS)
    later.update(loaded, REWARDS)
    wanted = direct.trainer.weights()
    assert all(torch.equal(w, wanted[n]) for n, w in later.trainer.weights().items())
    with pytest.raises(CheckpointError, match=r"no rollout.*\.json"):
        Rollout.load(tmp_path)


def test_a_used_rollout_stays_used_when_stored(tiny_sd3, tmp_path):
    engine = Engine(tiny_config(tiny_sd3, tmp_path))
    rollout = engine.rollout(PROMPTS)
    engine.update(rollout, REWARDS)
    rollout.save(tmp_path / "rollout")
    with pytest.raises(UsageError, match="was trained on already"):
        engine.update(Rollout.load(tmp_path / "rollout"), REWARDS)


def test_a_text_is_no_list_of_prompts(tiny_sd3, tmp_path):
    engine = Engine(tiny_config(tiny_sd3, tmp_path))
    for call in (engine.rollout, engine.generate):
        with pytest.raises(UsageError, match="prompts: the text 'a red dog'; takes a list"):
            call("a red dog")


def test_other_prompts_in_the_same_folder_are_refused(attempt, tmp_path):
    source = tmp_path / "mine.txt"
    source.write_text("one\ntwo\nthree\nfour")
    overrides = [f"prompts.source={source}"]
    assert attempt(*overrides, reward="left_bright", run={"epochs": 1})[0] == 0
    source.write_text("one\ntwo\nthree\nfive")
    status, message = attempt(*overrides, reward="left_bright", run={"epochs": 2})
    assert (status, len(metrics(tmp_path))) == (4, 1)
    assert "not the prompts that the run in" in message


def test_a_reward_that_fails_later_is_named_and_costs_no_whole_epoch(attempt, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_rewards, "calls", 0)
    settings = {"run": {"epochs": 5}, "checkpoint": {"every": 10}, "sampling": ONE_BLOCK}
    status, message = attempt(reward="blind_from_third_call", **settings)
    assert status == 5
    assert (
        "the first: reward 'engine.pixel_rewards:blind_from_third_call' gave nan to pair 8, branch 0, prompt" in message
    )
    assert [row["epoch"] for row in metrics(tmp_path)] == [1, 2]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["epoch_000002"]
    assert (tmp_path / "run/images/pairs_epoch_000003.png").is_file()
    found = json.loads((tmp_path / "run/status.json").read_text())
    assert (found["state"], found["phase"], found["last_checkpoint"]) == ("failed", "reward", "epoch_000002")


def test_damaged_settings_of_a_run_are_named(attempt, tmp_path):
    assert attempt(run={"epochs": 1})[0] == 0
    file = tmp_path / "run/config.yaml"
    whole = file.read_text()
    file.write_text(whole[: whole.index("sampling:")] + "sampling: {steps: [")
    status, message = attempt(run={"epochs": 1})
    assert status == 7
    assert f"{file}: damaged" in message
    file.write_text(whole.replace("epochs:", "epochz:"))
    with pytest.raises(ConfigError, match=r"config.yaml:\d+\s+run.epochz: unknown key"):
        Engine.resume(tmp_path / "run")
