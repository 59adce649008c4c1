"""The weighted list of rewards: its sum, its failures, and what it refuses."""

import math
import sys
import types

import pytest
import torch

from fdfo_engine.config import RewardConfig
from fdfo_engine.rewards import Reward, WeightedRewards, build, names
from fdfo_engine.runtime.errors import RewardError, UsageError

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


class Flaky:
    """Fails as often as it is told, then scores 1, 2, 3."""

    def __init__(self, failures):
        self.failures, self.calls = failures, 0

    def __call__(self, prompts, images):
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("server away")
        return torch.arange(1.0, len(images) + 1)


def weighted(log_folder=None, **parts):
    return WeightedRewards(parts, log_folder)


def total(rewards):
    return rewards.combined(rewards(PROMPTS, IMAGES))


def test_the_sum_is_weighted_and_parts_are_not():
    rewards = weighted(
        up=(2.0, lambda p, x: torch.tensor([1.0, 2.0, 3.0])), down=(-0.5, lambda p, x: torch.tensor([4.0, 0.0, 2.0]))
    )
    assert total(rewards).tolist() == [0.0, 4.0, 5.0]
    scores = rewards(PROMPTS, IMAGES)
    assert {n: s.tolist() for n, s in scores.items()} == {"up": [1.0, 2.0, 3.0], "down": [4.0, 0.0, 2.0]}
    assert total(rewards).dtype == torch.float32


def test_a_config_builds_it_with_options():
    module = types.ModuleType("my_rewards")
    module.scaled = lambda prompts, images, factor=1.0: factor * images.flatten(1).mean(1)
    sys.modules["my_rewards"] = module
    try:
        parts = [
            RewardConfig(name="my_rewards:scaled", weight=1.0, factor=10.0),
            RewardConfig(name="brightness", weight=2.0),
        ]
        rewards = WeightedRewards.from_config([*parts, RewardConfig(name="brightness", weight=-1.0)])
        scores = rewards(PROMPTS, IMAGES)
    finally:
        del sys.modules["my_rewards"]
    brightness = IMAGES.double().flatten(1).mean(1)
    assert list(scores) == ["my_rewards:scaled", "brightness", "brightness_2"]
    assert (rewards.combined(scores) - 11 * brightness).abs().max() < 1e-5


def test_a_failure_is_tried_once_more(capsys):
    reward = Flaky(1)
    assert total(weighted(flaky=(1.0, reward))).tolist() == [1.0, 2.0, 3.0]
    assert reward.calls == 2
    assert "server away" in capsys.readouterr().err


def test_a_second_failure_is_no_opinion_and_never_a_number(tmp_path, capsys):
    reward = Flaky(2)
    rewards = weighted(tmp_path / "logs", flaky=(1.0, reward), other=(1.0, lambda p, x: torch.ones(3)))
    scores = rewards(PROMPTS, IMAGES)
    assert all(math.isnan(s) for s in rewards.combined(scores).tolist())
    assert scores["other"].tolist() == [1.0] * 3
    assert reward.calls == 2
    assert (tmp_path / "logs" / "reward_flaky.log").read_text().count("OSError: server away") == 2
    assert total(rewards).tolist() == [2.0, 3.0, 4.0]  # the next batch has a fresh chance


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_score_costs_one_image(bad):
    rewards = weighted(a=(1.0, lambda p, x: torch.tensor([1.0, bad, 3.0])), b=(-1.0, lambda p, x: torch.zeros(3)))
    first, second, third = total(rewards).tolist()
    assert (first, third) == (1.0, 3.0)
    assert math.isnan(second)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(2), "returned 2 scores for 3 images"),
        (torch.ones(3, 1), r"returned shape \(3, 1\) for 3 images"),
        (torch.tensor(1.0), "for 3 images"),
        (None, "returned a NoneType"),
        ("high", "returned a str"),
    ],
)
def test_what_is_not_one_number_an_image_stops(returned, message):
    with pytest.raises(RewardError, match=message):
        weighted(mine=(1.0, lambda p, x: returned))(PROMPTS, IMAGES)


@pytest.mark.parametrize("returned", [[1, 2, 3], torch.tensor([1, 2, 3]), torch.tensor([1.0, 2, 3]).bfloat16()])
def test_numbers_of_any_kind_are_taken(returned):
    assert total(weighted(mine=(1.0, lambda p, x: returned))).tolist() == [1.0, 2.0, 3.0]


def test_a_reward_runs_without_gradients():
    seen = []
    weighted(mine=(1.0, lambda p, x: seen.append(torch.is_grad_enabled()) or torch.ones(3)))(PROMPTS, IMAGES)
    assert seen == [False]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("brightnes", {}, "did you mean 'brightness'"),
        ("no_such_module:reward", {}, "no_such_module"),
        ("math:no_such_thing", {}, "no_such_thing"),
        ("math:pi", {}, "is a float, takes something to call"),
        ("brightness", {"gamma": 2}, r"rewards.0.*gamma"),
    ],
)
def test_a_reward_that_cannot_be_built_is_named(name, options, message):
    with pytest.raises(UsageError, match=message):
        build(name, options, "rewards.0.name")


@pytest.mark.parametrize("name", ["shapes", "shapes_strict", "brightness"])
def test_a_reward_without_a_model_scores_at_once(name):
    scores = build(name, {}, "rewards.0.name")(["a red circle"], torch.rand(1, 3, 64, 64))
    assert scores.shape == (1,)


def test_every_built_in_name_is_found_and_says_what_it_takes():
    for name in names():
        with pytest.raises(UsageError, match=r"rewards\.0.*no_such_option"):
            build(name, {"no_such_option": 1}, "rewards.0.name")


def test_rewards_that_said_they_are_ready_are_not_asked_again():
    class Counted(Reward):
        asked = 0

        def require_ready(self):
            self.asked += 1
            if self.asked == 1:
                raise RewardError("not yet")

    reward = Counted()
    rewards = WeightedRewards({"mine": (1.0, reward)})
    with pytest.raises(RewardError, match="not yet"):
        rewards.require_ready()
    rewards.require_ready()
    rewards.require_ready()
    assert reward.asked == 2


class Sized(Reward):
    def __init__(self, size, notes=()):
        self.size, self.notes = size, list(notes)

    def gpu_bytes(self):
        return self.size

    def take_notes(self):
        taken, self.notes = self.notes, []
        return {"light": torch.tensor(taken)}


def test_what_models_take_is_added_up_and_what_is_not_known_is_named():
    rewards = weighted(a=(1.0, Sized(3)), b=(1.0, Sized(None)), c=(1.0, Sized(0)), d=(1.0, Sized(4)))
    assert rewards.gpu_bytes() == (7, ["b"])
    assert rewards.without(["a", "b"]).gpu_bytes() == (4, [])
    kept = WeightedRewards({"a": (2.0, Sized(1)), "b": (3.0, Sized(2))}, normalize={"b": "pair"}).without({"a"})
    assert ({name: weight for name, (weight, _) in kept.rewards.items()}, kept.normalize) == ({"b": 3.0}, {"b": "pair"})


def test_notes_are_means_over_what_is_known_once():
    rewards = weighted(
        a=(1.0, Sized(0, [0.25, math.nan, 0.75, math.inf])), b=(1.0, Sized(0, [math.nan])), c=(1.0, Sized(0))
    )
    assert rewards.note_means() == {"light_a": 0.5}
    assert rewards.note_means() == {}


def test_the_sum_of_logged_means_is_unknown_where_one_is():
    rewards = weighted(a=(2.0, None), b=(-1.0, None))
    assert rewards.plain_mean({"reward_a_mean": 3.0, "reward_b_mean": 5.0}) == 1.0
    assert math.isnan(rewards.plain_mean({"reward_a_mean": 3.0}))
    assert math.isnan(rewards.plain_mean({"reward_a_mean": 3.0, "reward_b_mean": None}))


def test_a_log_is_named_by_what_a_file_may_be_called_and_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("FDFO_REWARD_KEY", "very-secret-key")

    def fails(prompts, images):
        raise OSError("no entry for very-secret-key")

    weighted(tmp_path, **{"http://a:1/b c": (1.0, fails)})(PROMPTS, IMAGES)
    (log,) = tmp_path.iterdir()
    assert log.name == "reward_http___a_1_b_c.log"
    assert log.read_text().count("OSError: no entry for ***") == 2
    assert "very-secret-key" not in log.read_text()


def test_disagreements_need_two_opinions_of_any_size():
    a, b = torch.tensor([[1e-30, 0.0], [0.0, 5.0], [1.0, 1.0]]), torch.tensor([[9.0, 8.0], [3.0, 2.0], [0.0, 1.0]])
    assert weighted(a=(0.1, None), b=(7.0, None)).disagreements({"a": a, "b": b}) == {"disagreement_a_b": 0.5}
