"""Several rewards as one: normalised by the epoch, and how often they disagree."""

import math

import pytest
import torch

from fdfo_engine.config import RewardConfig, load_config
from fdfo_engine.rewards import WeightedRewards

A = torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 1.0], [math.nan, 4.0]])
B = torch.tensor([[10.0, 30.0], [90.0, 10.0], [20.0, 60.0], [10.0, 20.0]])


def rewards(weights=(1.0, 1.0), normalize=("none", "none")):
    return WeightedRewards(
        {"a": (weights[0], None), "b": (weights[1], None)}, normalize=dict(zip("ab", normalize, strict=True))
    )


def test_without_normalising_it_is_the_weighted_sum():
    total = rewards((2.0, -0.5)).combined({"a": A, "b": B})
    assert torch.equal(total[:3], (2 * A - 0.5 * B)[:3])
    assert math.isnan(total[3, 0])
    assert total[3, 1] == -2.0


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("std", torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 1.0, 4.0]).std(correction=0)),
        ("pair", torch.tensor([-1.0, 0.0, 2.0]).square().mean().sqrt()),
    ],
)
def test_normalised_parts_weigh_the_same_whatever_their_scale(kind, scale):
    normalised = rewards(normalize=(kind, "none"))
    total = normalised.combined({"a": A, "b": torch.zeros(4, 2)})
    assert torch.allclose(total[:3], A[:3] / scale)
    assert torch.allclose(total[:3], normalised.combined({"a": 1000 * A, "b": torch.zeros(4, 2)})[:3])


def test_pair_gives_advantages_of_size_one():
    total = rewards((3.0, 1.0), ("pair", "pair")).combined({"a": B, "b": torch.zeros(4, 2)})
    assert ((total[:, 0] - total[:, 1]) / 2).square().mean().sqrt() == pytest.approx(3.0)


@pytest.mark.parametrize("kind", ["std", "pair"])
@pytest.mark.parametrize("part", [torch.full((4, 2), 7.0), torch.full((4, 2), math.nan)])
def test_what_prefers_nothing_stays_as_it_is(kind, part):
    total = rewards(normalize=(kind, "none")).combined({"a": part, "b": B})
    assert torch.equal(total.nan_to_num(-1.0), (part + B).nan_to_num(-1.0))


def test_disagreements_count_pairs_with_two_opinions():
    """Pairs 0 and 2 count: a ties in pair 1 and has no opinion in pair 3."""
    parts = {"a": A, "b": B}
    assert rewards().disagreements(parts) == {"disagreement_a_b": 0.5}
    assert rewards((1.0, -1.0)).disagreements(parts) == {"disagreement_a_b": 0.5}
    agreeing = {"a": A, "b": torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])}
    assert rewards().disagreements(agreeing) == {"disagreement_a_b": 0.0}
    assert rewards((1.0, -1.0)).disagreements(agreeing) == {"disagreement_a_b": 1.0}
    assert rewards().disagreements({"a": A, "b": torch.zeros(4, 2)}) == {}


def test_the_table_shows_scales_and_pulls():
    lines = rewards((2.0, -0.1), ("pair", "none")).describe({"a": A, "b": B}).splitlines()
    assert lines[0].split() == ["reward", "mean", "std", "weight", "pull"]
    name, mean, _, weight, pull = lines[1].split()
    assert (name, float(mean), float(weight), float(pull)) == ("a", pytest.approx(18 / 7, rel=1e-3), 2.0, 2.0)
    halves = torch.tensor([-10.0, 40.0, -20.0, -5.0])
    assert float(lines[2].split()[4]) == pytest.approx(-0.1 * halves.square().mean().sqrt().item(), rel=1e-3)


def test_normalising_is_an_option_of_each_reward():
    settings = [
        RewardConfig(name="brightness", weight=1.0, normalize="pair"),
        RewardConfig(name="shapes", weight=2.0),
    ]
    assert WeightedRewards.from_config(settings).normalize == {"brightness": "pair", "shapes": "none"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("sd35m_combined", {"pickscore": 1.0, "vlm_alignment": 0.1}),
        ("sd35m_pickscore", {"pickscore": 1.0}),
        ("sd35m_vlm", {"vlm_alignment": 1.0}),
    ],
)
def test_the_papers_runs_are_bundled(config, expected):
    settings = load_config(config).rewards
    built = WeightedRewards.from_config(settings).rewards
    assert {name: weight for name, (weight, _) in built.items()} == expected
