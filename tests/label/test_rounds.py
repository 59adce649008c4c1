"""Choices on a real engine: mixed with an automatic reward, weighed by distance; and the pairs of a comparison."""

import io
import statistics

import numpy as np
import pytest
from PIL import Image
from serve.serving import served, shapes_config

from fdfo_engine.client import ServerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MIXED = ("rewards.0.name=person", "rewards.1.name=brightness", "rewards.1.weight=2.0")


def brightness(png):
    return float(np.asarray(Image.open(io.BytesIO(png))).mean() / 255)


def test_choices_are_added_to_the_other_rewards(tmp_path):
    """reward = choice + 2 * brightness, over the pairs that have a choice."""
    with served(shapes_config(tmp_path / "run", *MIXED)) as client:
        sampled = client.create_round(count=4)
        pairs = client.pairs(sampled["round"])
        choices = ("left", "right", "tie", "skip")
        judgements = [{"pair_id": p["pair_id"], "choice": c} for p, c in zip(pairs, choices, strict=True)]
        client.feedback(sampled["round"], judgements)
        seen = [brightness(client.image(pair[side])) for pair in pairs[:3] for side in ("left", "right")]
        client.train(sampled["round"])
        (epoch,) = client.metrics()["epochs"]
        assert epoch["reward_mean"] == pytest.approx(0.5 + 2 * statistics.mean(seen), abs=2e-3)
        assert (epoch["lost_pairs"], epoch["tied_pairs"]) == (1, 0)  # a tie, too, has a brighter image


def test_distance_halves_no_more_than_the_nearer_half(tmp_path):
    """|A| = min(1, d / median) / 2 for each choice; its mean is told."""
    with served(shapes_config(tmp_path / "run", "labels.scale=distance")) as client:
        name = client.create_round(count=4)["round"]
        pairs = client.pairs(name)
        client.feedback(name, [{"pair_id": pair["pair_id"], "choice": "left"} for pair in pairs])
        distances = [pair["distance"] for pair in pairs]
        client.train(name)
        shares = [min(1.0, distance / statistics.median(distances)) for distance in distances]
        (epoch,) = client.metrics()["epochs"]
        assert min(shares) < 1
        assert epoch["advantage_abs_mean"] == pytest.approx(statistics.mean(shares) / 2, rel=1e-5)


def test_a_comparison_holds_the_base_and_the_trained_model(tmp_path):
    with served(shapes_config(tmp_path / "run", "evaluation.seed=5")) as client:
        with pytest.raises(ServerError, match="nothing was trained"):
            client.compare(count=2)
        name = client.create_round(count=4)["round"]
        client.feedback(name, [{"pair_id": pair["pair_id"], "choice": "left"} for pair in client.pairs(name)])
        client.train(name)
        compared = client.compare(count=3)
        first = compared["pairs"][0]
        for model, image in zip(("base", "run"), first["images"], strict=True):
            (drawn,) = client.generate(first["prompt"], model=model, seed=5)
            assert drawn == client.image(image)
        assert client.image(first["images"][0]) != client.image(first["images"][1])
        assert [row["kind"] for row in client.rounds()] == ["training", "comparison"]
        with pytest.raises(ServerError, match="nothing trains on it"):
            client.train(compared["round"])
        event = client.feedback(compared["round"], [{"pair_id": first["pair_id"], "choice": "right"}])[0]
        client.withdraw(compared["round"], event)
        (opinion,) = client.opinions(compared["round"])
        assert (opinion["choice"], opinion["withdrawn"], opinion["counts"]) == ("right", True, False)
