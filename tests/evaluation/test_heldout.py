"""The evaluation of a run: cut into the same batches on any number of ranks, and made up for where it failed."""

import json

import pytest
import torch
from tiny_sd3 import tiny_config

from fdfo_engine.evaluation import heldout
from fdfo_engine.loop import run
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime.errors import RewardError
from fdfo_engine.runtime.progress import Progress


@pytest.mark.parametrize("count", [1, 5, 8])
def test_ranks_score_whole_batches_and_all_of_them(tiny_sd3, tmp_path, monkeypatch, count):
    settings = tiny_config(tiny_sd3, tmp_path, evaluation={"batch": 2}).evaluation
    seen = []

    def reward(prompts, images):
        seen.append(list(prompts))
        return images.flatten(1).mean(1)

    images, prompts = torch.rand(count, 3, 16, 16), [f"p{i}" for i in range(count)]
    parts = []
    for rank in range(3):
        monkeypatch.setattr(heldout, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(heldout, "world_size", lambda: 3)
        rewards = WeightedRewards({"mean": (1.0, reward)})
        with Progress().phase("scoring") as phase:
            parts.append(heldout._measured(prompts, images, rewards, settings, phase))
    assert seen == [prompts[i : i + 2] for i in range(0, count, 2)]
    assert torch.cat([scores["mean"] for scores, _ in parts]).allclose(images.flatten(1).mean(1))
    assert all(sum(len(health[name]) for _, health in parts) == count for name in settings.health)


def test_nothing_to_score_is_no_error():
    scores = WeightedRewards({})(["a", "b"], torch.rand(2, 3, 4, 4))
    assert scores == {}


def test_the_sum_of_logged_means_knows_no_normalisation():
    rewards = WeightedRewards({"a": (2.0, None), "b": (-1.0, None)}, normalize={"a": "std", "b": "pair"})
    assert rewards.plain_mean({"reward_a_mean": 3.0, "reward_b_mean": 5.0, "reward_mean": 99.0}) == 1.0


def test_an_evaluation_that_failed_is_made_on_resume(tiny_sd3, tmp_path, monkeypatch, capsys):
    calls, original = [], heldout.evaluate

    def second_one_fails(engine, *arguments, **more):
        calls.append(engine.epoch)
        if len(calls) == 2:
            raise RewardError("the server died")
        return original(engine, *arguments, **more)

    monkeypatch.setattr("fdfo_engine.training.evaluating.evaluate", second_one_fails)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n{"prompt": "b"}\n')
    evaluation = {"every": 1, "count": 2, "prompts": str(tmp_path / "p.jsonl")}
    config = tiny_config(tiny_sd3, tmp_path / "run", run={"epochs": 1}, evaluation=evaluation)
    with pytest.raises(RewardError, match="the server died"):
        run(config)
    assert "evaluation: 2 prompts (left out: 1 null)\n" in capsys.readouterr().out
    run(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert calls == [0, 1, 1]
