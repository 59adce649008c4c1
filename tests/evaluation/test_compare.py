"""Base against tuned on a tiny pipeline: every number by another way, on any batch size and number of ranks."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from engine.launching import ROOT, launch
from PIL import Image
from scipy import stats
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.cli.evaluate import _prompts
from fdfo_engine.cli.main import main
from fdfo_engine.config import MetricConfig, RewardConfig, dump_config, load_config
from fdfo_engine.evaluation import metric_rewards
from fdfo_engine.evaluation.measures import build_measures
from fdfo_engine.metrics import measure_health
from fdfo_engine.metrics.diversity import pixel_diversity
from fdfo_engine.report.evaluation_page import extremes
from fdfo_engine.rewards import WeightedRewards, labelled
from fdfo_engine.rewards.ocr import OcrOptions

SEEDS, COUNT = 3, 7
METRICS = "engine.pixel_rewards:left_bright,brightness,diversity,health"


@pytest.fixture(scope="module")
def trained(tiny_sd3, tmp_path_factory):
    """A run folder with checkpoints of epochs 1 and 2, and a list of seven prompts."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(tiny_sd3, folder / "run", update={"ema": 0.5}, evaluation={"every": 0, "batch": 3})
    engine = Engine(config)
    for _ in range(2):
        rollout = engine.rollout(PROMPTS)
        engine.update(rollout, 10 * rollout.images.flatten(2).mean(2))
        engine.save()
    (folder / "run/config.yaml").write_text(dump_config(config))
    (folder / "list.txt").write_text("\n".join([*PROMPTS, *PROMPTS[:3]]))
    return folder


def evaluate(trained, out, *words, run="run"):
    common = ["--prompts", str(trained / "list.txt"), "--images-per-prompt", str(SEEDS), "--metrics", METRICS]
    code = main(["evaluate", str(trained / run), "--out", str(out), *common, *words])
    assert code == 0
    return json.loads((out / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def result(trained):
    return evaluate(trained, trained / "out", "--checkpoint", "all", "--seed", "5")


def images_of(trained, name, weights, batch=3):
    engine = Engine.resume(trained / "run", name)
    prompts = (trained / "list.txt").read_text().split("\n")
    return torch.stack([engine.generate(prompts, seed=5 + k, weights=weights) for k in range(SEEDS)], 1)


def test_scores_are_means_over_the_seeds_of_whole_lists_generated_at_once(trained, result):
    assert [s["name"] for s in result["sets"]] == ["base", "epoch_000001", "epoch_000002"]
    assert [s["weights"] for s in result["sets"]] == ["raw", "ema", "ema"]
    images = images_of(trained, "epoch_000002", "ema")
    found = result["scores"]["epoch_000002"]
    assert found["brightness"] == pytest.approx(images.flatten(2).mean(2).mean(1).tolist(), rel=1e-6)
    left = 100 * (images[..., :8] - images[..., 8:]).flatten(2).mean(2)
    assert found["engine.pixel_rewards:left_bright"] == pytest.approx(left.mean(1).tolist(), rel=1e-4, abs=1e-5)
    assert found["pixel_diversity"] == pytest.approx(pixel_diversity(images).tolist(), rel=1e-6)
    sharp = measure_health(images.flatten(0, 1), ["sharpness"])["sharpness"].view(COUNT, SEEDS)
    assert found["sharpness"] == pytest.approx(sharp.mean(1).tolist(), rel=1e-6)


def test_intervals_are_those_of_scipys_paired_test(result):
    for metric in ("brightness", "sharpness", "pixel_diversity"):
        before, after = (np.array(result["scores"][name][metric]) for name in ("base", "epoch_000002"))
        found = result["differences"]["epoch_000002"][metric]
        expected = stats.ttest_rel(after, before).confidence_interval(0.95)
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-6)
        assert found["low"] <= found["bootstrap_low"] <= found["mean"] <= found["bootstrap_high"] <= found["high"]
        assert found["rose"] == pytest.approx((after > before).mean())
        assert found["count"] == COUNT


def test_scores_do_not_depend_on_the_batch_size(trained, result):
    """But for the last bits of a forward, which depend on the size of its batch."""
    config = (trained / "run/config.yaml").read_text()
    try:
        (trained / "run/config.yaml").write_text(config.replace("batch: 3", "batch: 2"))
        other = evaluate(trained, trained / "out_batch", "--checkpoint", "all", "--seed", "5", "--larger", "1")
    finally:
        (trained / "run/config.yaml").write_text(config)
    for name, scores in result["scores"].items():
        for metric, values in scores.items():
            assert other["scores"][name][metric] == pytest.approx(values, rel=1e-4, abs=1e-5), (name, metric)


@pytest.mark.slow
def test_two_ranks_score_the_same_bits(trained, result):
    done = launch(
        ROOT / "fdfo_engine/cli/main.py", "evaluate", trained / "run", "--out", trained / "out_ranks",
        "--checkpoint", "all", "--seed", 5, "--prompts", trained / "list.txt", "--images-per-prompt", SEEDS,
        "--metrics", METRICS, "--larger", 1, by="torchrun", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    other = json.loads((trained / "out_ranks/evaluation.json").read_text())
    assert other["scores"] == result["scores"]
    assert other["differences"] == result["differences"]
    assert done.stdout.count("report:") == 1


def test_a_prompt_keeps_its_scores_when_the_list_grows(trained, result):
    few = evaluate(
        trained, trained / "out_few", "--checkpoint", "epoch_000002", "--seed", "5", "--count", "3", "--larger", "1"
    )
    for metric, values in few["scores"]["epoch_000002"].items():
        assert values == pytest.approx(result["scores"]["epoch_000002"][metric][:3], rel=1e-4, abs=1e-5), metric


def test_the_larger_size_is_measured_where_the_model_allows_it(trained, result):
    assert (result["larger"]["height"], result["larger"]["width"]) == (32, 32)
    assert [s["name"] for s in result["larger"]["sets"]] == ["base", "epoch_000002"]
    assert {m["kind"] for m in result["larger"]["metrics"]} == {"health"}
    assert np.isfinite(result["larger"]["summary"]["base"]["sharpness"]["mean"])
    beyond = evaluate(trained, trained / "out_beyond", "--untrained", "--larger", "3", "--count", "2")
    assert "multiple of 4 up to 32" in beyond["larger"]["note"]


@pytest.mark.parametrize(("count", "found"), [(None, 2), (1, 1), (3, 3), (99, 4)])
def test_count_is_of_the_list_and_not_of_the_runs_evaluation(tiny_sd3, tmp_path, count, found):
    config = tiny_config(tiny_sd3, tmp_path, evaluation={"count": 2})
    assert _prompts(Namespace(prompts=None, count=count), config) == list(PROMPTS[:found])


def test_the_untrained_model_alone_and_one_checkpoint(trained):
    alone = evaluate(trained, trained / "out_base", "--untrained", "--larger", "1")
    assert [s["name"] for s in alone["sets"]] == ["base"]
    assert alone["differences"] == {}
    words = ["--checkpoint", "epoch_000001", "--count", "2", "--larger", "1", "--raw"]
    words += ["--prompts", str(trained / "list.txt"), "--images-per-prompt", "1"]
    assert main(["evaluate", str(trained / "run"), "--out", str(trained / "out_one"), *words]) == 0
    found = json.loads((trained / "out_one/evaluation.json").read_text())
    assert [(s["name"], s["weights"]) for s in found["sets"]] == [("base", "raw"), ("epoch_000001", "raw")]
    assert "pixel_diversity" not in found["scores"]["base"], "one image has no diversity"


def test_pictures_are_those_that_were_scored(trained, result):
    images = images_of(trained, None, "ema")
    winners, losers = extremes(result)
    metric = result["metrics"][0]["name"]
    changes = np.subtract(*(result["scores"][name][metric] for name in ("epoch_000002", "base")))
    assert winners == [i for i in np.argsort(-changes) if changes[i] > 0][:6]
    assert losers == [i for i in np.argsort(changes) if changes[i] < 0][:6]
    for index in (0, COUNT - 1):
        with Image.open(trained / f"out/pictures/epoch_000002/{index:05d}.png") as file:
            saved = np.asarray(file)
        expected = (images[index, 0] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.abs(saved.astype(int) - expected.astype(int)).max() <= 1
    brightness = images[:, 0].flatten(1).mean(1).tolist()
    assert result["picture_scores"]["epoch_000002"]["brightness"] == pytest.approx(brightness, rel=1e-4)
    assert brightness != pytest.approx(result["scores"]["epoch_000002"]["brightness"], rel=1e-4)


TWICE = [
    {"name": "engine.pixel_rewards:left_bright", "weight": 1.0},
    {"name": "brightness", "weight": 1.0},
    {"name": "brightness", "weight": -2.0, "normalize": "std"},
]


@pytest.mark.parametrize(
    ("names", "more", "columns"),
    [
        ((), (), ["engine.pixel_rewards:left_bright", "brightness", "brightness_2", "shapes"]),
        (("brightness",), (), ["brightness", "brightness_2"]),
        (("brightness_2", "shapes_strict"), (), ["brightness_2", "shapes_strict"]),
        (("shapes",), ({"name": "ocr", "threads": 2}, {"name": "ocr"}), ["shapes", "ocr", "ocr_5"]),
    ],
)
def test_two_rewards_of_one_name_have_a_column_each_as_in_the_log(tiny_sd3, tmp_path, names, more, columns):
    config = tiny_config(tiny_sd3, tmp_path, rewards=TWICE, evaluation={"metrics": ["shapes", "brightness"]})
    entries = [MetricConfig(**entry) for entry in more]
    built = build_measures(config, names, more=entries, images_per_prompt=1, device=torch.device("cpu"))
    assert [name for name, kind in built.kinds.items() if kind == "reward"] == columns
    assert list(metric_rewards(config).rewards)[:3] == list(WeightedRewards.from_config(config.rewards).rewards)
    assert [threads for n, (_, r) in built.rewards.rewards.items() if (threads := getattr(r, "options", None))] == [
        OcrOptions(threads=2), OcrOptions(),
    ][: len(more)]  # fmt: skip


def test_a_label_never_hides_another():
    parts = [RewardConfig(name=name, weight=1.0) for name in ("a", "a_2", "a", "a", "a_3")]
    assert [part.name for part in labelled(parts).values()] == ["a", "a_2", "a", "a", "a_3"]


def test_a_metric_of_a_run_may_have_options(tiny_sd3, tmp_path):
    metrics = ["shapes", {"name": "ocr", "threads": 3}]
    config = tiny_config(tiny_sd3, tmp_path, evaluation={"metrics": metrics})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert yaml.safe_load(dump_config(config))["evaluation"]["metrics"] == [{"name": "shapes"}, metrics[1]]
    assert metric_rewards(again).rewards["ocr"][1].options.threads == 3


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--metrics", "brightnes"], 2, "--metrics brightnes: no such metric. did you mean 'brightness'"),
        (["--metrics", "sharpnes"], 2, "--metrics sharpnes: no such metric. did you mean 'sharpness'"),
        (["--metrics", "divresity"], 2, "did you mean 'diversity'"),
        (["--metrics", "no_such_module:reward"], 2, "--metrics no_such_module:reward: ModuleNotFoundError: No module"),
        (["--metric", "brightnes"], 2, "--metric brightnes: no such reward. did you mean 'brightness'"),
        (["--metrics", "diversity", "--images-per-prompt", "1"], 2, "--images-per-prompt"),
        (["--metrics", "clip_diversity", "--clip", "nobody/none"], 3, "--allow-download"),
        (["--metrics", "dreamsim_diversity"], 3, "--allow-download"),
        (["--metrics", "pickscore"], 3, "PickScore_v1: not on this machine; nothing is fetched unasked"),
        (["--metric", "{name: aesthetic, head: no/body}"], 3, "not on this machine"),
        (["--metric", "{name: ocr, threds: 2}"], 2, "did you mean threads?"),
        (["--metric", "{name: ocr, api_key: abc}"], 2, "api_key"),
        (["--metric", "{name"], 2, "--metric"),
        (["--metric", "{name: geneval, metadata: M}"], 5, "no requirements for the prompt"),
        (["--checkpoint", "epoch_000009"], 7, "no checkpoint epoch_000009; found: epoch_000001, epoch_000002"),
        (["--ema", "--checkpoint", "/elsewhere/checkpoints/epoch_000001"], 7, "no checkpoint /elsewhere"),
        (["--prompts", "drawbench"], 4, "nothing is fetched unasked"),
        (["--confidence", "1"], 2, "--confidence"),
        (["--out", "FULL"], 2, "--overwrite"),
    ],
)
def test_refusals(trained, words, code, says, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(trained / "empty"))
    (trained / "m.jsonl").write_text('{"prompt": "a cat", "include": [{"class": "cat"}]}')
    words = [str(trained / "out") if word == "FULL" else word.replace("M}", f"{trained}/m.jsonl}}") for word in words]
    assert main(["evaluate", str(trained / "run"), "--larger", "1", *words]) == code
    assert says in capsys.readouterr().err
    assert not (trained / "run/evaluation").exists()
