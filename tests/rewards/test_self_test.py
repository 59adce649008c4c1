"""The self-test tells a reward that sees from one that does not; with real weights only where they are at hand."""

import pytest
import torch

from fdfo_engine.rewards import build
from fdfo_engine.rewards.self_test import self_test
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError


def test_a_reward_that_sees_passes():
    circle, noise = self_test(lambda prompts, images: images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2)), side=64)
    assert circle > 0.1 > noise


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, images: torch.zeros(2), "scores 0 where it is drawn and 0 for noise"),
        (lambda prompts, images: torch.tensor([0.0, 1.0]), "for noise"),
        (lambda prompts, images: torch.tensor([1.0, torch.nan]), "takes two numbers"),
        (lambda prompts, images: torch.ones(1), "takes two numbers"),
    ],
)
def test_a_reward_that_does_not_see_fails(reward, message):
    with pytest.raises(RewardError, match=message):
        self_test(reward)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "aesthetic", "vlm_alignment"])
def test_real_weights_see(name, monkeypatch):
    """Takes weights from the local hub cache only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        self_test(build(name, {}, "x"))
    except (RewardError, EnvironmentProblem) as error:
        if "self-test" in str(error):
            raise
        pytest.skip(f"no weights here: {error}")
