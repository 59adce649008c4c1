"""What an evaluation writes down, on scores that are written out here: no model, no picture."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from fdfo_engine.config import GuardConfig, load_config
from fdfo_engine.evaluation import compare, evaluation_list, evaluation_prompts, metric_rewards
from fdfo_engine.evaluation.compare import Measured, Request, summarize
from fdfo_engine.evaluation.heldout import Evaluation
from fdfo_engine.evaluation.measures import Measures
from fdfo_engine.shapes.scene import captions

NAN = math.nan


@pytest.fixture
def configured(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run: {dir: r}\nmodel: {id: m}\nprompts: {source: shapes}\nrewards: [{name: brightness}]\n")
    return lambda *overrides: load_config(file, overrides)


def engine_of(config, epoch=7, ema=None):
    return SimpleNamespace(config=config, epoch=epoch, ema=ema)


def test_a_record_has_means_their_errors_and_the_runs_own_sum(configured):
    config = configured("rewards=[{name: a, weight: 2.0}, {name: b, weight: -0.5, normalize: std}]")
    a, b, more = [1.0, 2.0, 4.0, NAN], [10.0, 30.0, 50.0, 70.0], [5.0, 5.0, 5.0, 8.0]
    scores = {name: torch.tensor(values) for name, values in (("a", a), ("b", b), ("more", more))}
    health = {"saturation": torch.tensor([0.1, 0.3, NAN, 0.5]), "clipped": torch.tensor([0.25, NAN, NAN, NAN])}
    result = Evaluation(list("wxyz"), torch.zeros(4, 3, 2, 2), scores, health, {"answer_mass_a": 0.5})
    record = result.record(engine_of(config), "auto", 3)
    assert record["metrics"] == pytest.approx({"a": 7 / 3, "b": 40.0, "more": 5.75})
    errors = {"a": stats.sem([1, 2, 4]), "b": stats.sem(b), "more": stats.sem(more)}
    assert record["metrics_stderr"] == pytest.approx(errors)
    total = [2.0 - 5.0, 4.0 - 15.0, 8.0 - 25.0]  # without normalising, and without the last, of which a knows nothing
    assert record["reward"] == pytest.approx(np.mean(total))
    assert record["reward_stderr"] == pytest.approx(stats.sem(total))
    assert record["health"] == pytest.approx({"saturation": 0.3, "clipped": 0.25})
    assert record["health_std"] == pytest.approx({"saturation": 0.2, "clipped": 0.0})
    assert (record["epoch"], record["count"], record["seed"], record["weights"]) == (7, 4, 3, "raw")
    assert record["notes"] == {"answer_mass_a": 0.5}


@pytest.mark.parametrize(
    ("weights", "keeps", "used"), [("auto", True, "ema"), ("auto", False, "raw"), ("raw", True, "raw")]
)
def test_a_record_says_whose_images_these_are(configured, weights, keeps, used):
    result = Evaluation(["x"], torch.zeros(1, 3, 2, 2), {"brightness": torch.ones(1)})
    assert result.record(engine_of(configured(), ema={} if keeps else None), weights, 0)["weights"] == used


def test_prompts_are_held_out_as_many_as_asked_for_and_keyed_by_the_evaluations_seed(configured, tmp_path):
    config = configured("run.seed=3", "evaluation.seed=4", "evaluation.count=9", "prompts.count=5")
    assert evaluation_prompts(config) == evaluation_list(config).prompts == captions("heldout", 9, 4)
    (tmp_path / "list.txt").write_text("a\nb\nc\n")
    own = configured(f"evaluation.prompts={tmp_path / 'list.txt'}", "evaluation.count=2")
    assert (evaluation_prompts(own), evaluation_list(own).prompts) == (["a", "b"], ["a", "b", "c"])


def test_a_metric_with_options_is_scored_beside_the_reward_of_its_name(configured):
    metrics = "evaluation.metrics=[shapes, ocr, {name: ocr, threads: 2}, brightness]"
    config = configured("rewards=[{name: brightness}, {name: ocr, threads: 3}]", metrics)
    assert list(metric_rewards(config).rewards) == ["brightness", "ocr", "shapes", "ocr_3"]


KINDS = {"r": "reward", "saturation": "health", "pixel_diversity": "diversity"}


def measured(name, reward, saturation):
    scores = {"r": torch.tensor(reward), "saturation": torch.tensor(saturation)}
    scores["pixel_diversity"] = torch.tensor([[0.5]] * len(reward))
    return Measured(name, 3, "raw", scores, None)


BASE = measured("base", [[1.0, 3.0], [4.0, 4.0], [0.0, 2.0], [6.0, NAN]], [[0.2, 0.4]] * 4)
TUNED = measured("tuned", [[5.0, 5.0], [4.0, 4.0], [0.0, 0.0], [9.0, 9.0]], [[0.5, 0.9]] * 4)


@pytest.fixture(scope="module")
def summary():
    request = Request(list("pqrs"), seed=5, images_per_prompt=2)
    return summarize([BASE, TUNED], KINDS, request, GuardConfig(), confidence=0.9, resamples=200)


def test_differences_are_tuned_less_base_prompt_by_prompt(summary):
    difference = summary["differences"]["tuned"]["r"]
    changes = [5.0 - 2.0, 0.0, 0.0 - 1.0]  # the fourth prompt has no score before
    interval = stats.t.interval(0.9, 2, np.mean(changes), stats.sem(changes))
    assert (difference["mean"], difference["count"]) == (pytest.approx(2 / 3), 3)
    assert (difference["low"], difference["high"]) == pytest.approx(interval)
    assert (difference["rose"], difference["fell"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert -1.0 <= difference["bootstrap_low"] < difference["mean"] < difference["bootstrap_high"] <= 3.0
    assert list(summary["differences"]) == ["tuned"]


def test_scores_are_means_over_the_images_of_a_prompt_and_pictures_are_the_first(summary):
    assert summary["scores"]["base"]["r"][:3] == [2.0, 4.0, 1.0]
    assert math.isnan(summary["scores"]["base"]["r"][3])
    assert summary["scores"]["tuned"]["saturation"] == pytest.approx([0.7] * 4)
    assert summary["picture_scores"] == {"base": {"r": [1.0, 4.0, 0.0, 6.0]}, "tuned": {"r": [5.0, 4.0, 0.0, 9.0]}}
    assert summary["summary"]["tuned"]["r"]["mean"] == 4.5
    assert summary["summary"]["base"]["r"]["mean"] == pytest.approx(7 / 3)


def test_health_is_held_against_the_images_of_the_base(summary):
    spread = np.std([0.2, 0.4] * 4, ddof=1)
    assert summary["health_drift"]["tuned"]["saturation"] == pytest.approx(0.4 / spread, rel=1e-5)
    (finding,) = summary["health_findings"]["tuned"]
    assert finding.startswith("saturation went from 0.3 to 0.7, ")


def test_an_interval_is_of_95_percent_and_ten_thousand_resamples_unless_asked_otherwise():
    defaults = inspect.signature(summarize).parameters
    assert (defaults["confidence"].default, defaults["resamples"].default) == (0.95, 10_000)
    request = Request(["a"])
    assert (request.seed, request.images_per_prompt, request.steps, request.guidance_scale) == (0, 1, None, None)


def test_the_request_and_the_list_are_written_down(summary):
    assert summary["request"] == {
        "prompts": 4, "seed": 5, "images_per_prompt": 2, "steps": None, "guidance_scale": None,
    }  # fmt: skip
    assert summary["metrics"] == [{"name": name, "kind": kind} for name, kind in KINDS.items()]
    assert [(s["name"], s["epoch"], s["weights"]) for s in summary["sets"]] == [("base", 3, "raw"), ("tuned", 3, "raw")]
    assert (summary["prompts"], summary["schema_version"], summary["confidence"]) == (list("pqrs"), 1, 0.9)


def test_image_k_has_seed_plus_k_and_seeds_begin_again_at_their_end():
    asked = []

    def generate(prompts, **how):
        asked.append(how)
        return torch.full((len(prompts), 3, 2, 2), float(len(asked)))

    request = Request(["a"], seed=2**64 - 2, images_per_prompt=4, steps=9, guidance_scale=2.0)
    images = compare._generate(SimpleNamespace(generate=generate), request, ["x", "y"], 30, "raw")
    assert [how.pop("seed") for how in asked] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert asked == [{"steps": 9, "guidance_scale": 2.0, "weights": "raw", "first": 30}] * 4
    assert images.shape == (2, 4, 3, 2, 2)
    assert images[1, :, 0, 0, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("height", "width", "size"), [(512, 256, (256, 128)), (64, 48, (64, 48)), (100, 400, (64, 256))]
)
def test_previews_are_at_most_256_pixels_a_side(height, width, size):
    images = torch.full((2, 3, height, width), 0.25)
    images[1] = 2.0
    found = compare._previews(images)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (2, 3, *size))
    assert (found[0].float().mean().item(), found[1].min().item()) == (64, 255)


def test_every_image_is_scored_with_its_prompt():
    class Rewards:
        def __init__(self):
            self.rewards = {"mine": None}

        def __call__(self, prompts, images):
            return {"mine": torch.tensor([float(prompt) for prompt in prompts]) + images.flatten(1)[:, 0]}

    images = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])[:, :, None, None, None].expand(3, 2, 3, 8, 8)
    measures = Measures(Rewards(), ("clipped",), {"even": lambda images_PK: images_PK.flatten(1).sum(1)})
    found = measures(["10", "20", "30"], images)
    torch.testing.assert_close(found["mine"], torch.tensor([[10.1, 10.2], [20.3, 20.4], [30.5, 30.6]]))
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "mine": (3, 2), "even": (3, 1), "clipped": (3, 2),
    }  # fmt: skip
    nothing = measures([], images[:0])
    assert {name: tuple(values.shape) for name, values in nothing.items()} == {
        "mine": (0, 2), "even": (0, 1), "clipped": (0, 2),
    }  # fmt: skip
    assert measures.kinds == {"mine": "reward", "even": "diversity", "clipped": "health"}
