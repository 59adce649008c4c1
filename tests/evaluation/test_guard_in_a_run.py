"""What a run does when its guard finds something, and a run that really hacks its reward."""

import json

import pytest
import torch
import yaml
from engine.launching import TRAIN, launch
from evaluation import pixel_rewards
from safetensors.torch import load_file
from tiny_sd3 import tiny_tree

from fdfo_engine import Engine
from fdfo_engine.config import HEALTH_MEASURES, load_config
from fdfo_engine.evaluation import evaluation_prompts
from fdfo_engine.loop import run
from fdfo_engine.metrics import measure_health
from fdfo_engine.report import write_report
from fdfo_engine.runtime.errors import GuardStop
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME, read_log
from fdfo_engine.shapes.pipeline import shapes_base

needs_base = pytest.mark.skipif(not (shapes_base() / "model_index.json").is_file(), reason="the shapes base is absent")
NEVER = {"saturation": [0.0, 1.0]}
ALWAYS_AFTER_0 = {"saturation": [-1.0, -0.5]}


@pytest.fixture
def start(tiny_sd3, tmp_path, monkeypatch):
    """Runs four epochs with an evaluation at 0 and after each, under a guard; it can see a slope from epoch 2 on."""
    monkeypatch.setattr(pixel_rewards, "scored", 0)

    def start(**guard):
        tree = tiny_tree(
            tiny_sd3, tmp_path / "run", run={"dir": str(tmp_path / "run"), "seed": 5, "epochs": 4},
            rewards=[{"name": "evaluation.pixel_rewards:ever_better", "weight": 1.0}],
            evaluation={"every": 1, "count": 2, "guard": guard}, checkpoint={"every": 1, "keep": 2},
        )  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        run(load_config(tmp_path / "config.yaml"))

    return start


def status(folder):
    return json.loads((folder / "run/status.json").read_text())


def checkpoints(folder):
    return sorted(path.name for path in (folder / "run/checkpoints").iterdir())


def test_a_guard_with_nothing_to_say_changes_nothing_and_health_is_logged(start, tmp_path):
    start(action="rollback", bands=NEVER, max_drift=1e9, reward_drop=1e9)
    assert status(tmp_path)["state"] == "finished"
    assert checkpoints(tmp_path) == ["epoch_000003", "epoch_000004"]
    records = read_log(tmp_path / "run" / EVALUATIONS_NAME)
    assert [record["guard"] for record in records] == [[], [], [], [], []]
    assert all(tuple(record["health"]) == HEALTH_MEASURES for record in records)
    engine = Engine.resume(tmp_path / "run")
    images = engine.generate(evaluation_prompts(engine.config), seed=0)
    for name, values in measure_health(images, HEALTH_MEASURES).items():
        assert records[-1]["health"][name] == pytest.approx(values.mean().item(), rel=1e-6)
        assert records[-1]["health_std"][name] == pytest.approx(values.std().item(), rel=1e-5)
    assert "Image health" in write_report(tmp_path / "run").read_text()


def test_warn_goes_on_and_the_report_says_why(start, tmp_path, capsys):
    start(action="warn", bands=ALWAYS_AFTER_0)
    assert status(tmp_path)["state"] == "finished"
    found = [e["guard"] for e in read_log(tmp_path / "run" / EVALUATIONS_NAME)]
    assert found[:2] == [[], []], "the training reward has not climbed yet"
    assert all("outside its band" in sentences[0] for sentences in found[2:])
    assert "guard, epoch 2: saturation" in capsys.readouterr().err
    page = write_report(tmp_path / "run").read_text()
    assert "The guard found" in page
    assert "epoch 4: saturation is" in page


def test_stop_after_its_patience_and_again_on_resume(start, tmp_path):
    with pytest.raises(GuardStop, match=r"(?s)saturation is .*stops after epoch 3"):
        start(action="stop", bands=ALWAYS_AFTER_0, patience=2)
    found = status(tmp_path)
    assert (found["state"], found["exit_code"], found["epoch"]) == ("stopped", 5, 3)
    assert "the training reward climbs, but saturation" in found["message"]
    assert checkpoints(tmp_path) == ["epoch_000002", "epoch_000003"]
    assert "the training reward climbs, but saturation" in write_report(tmp_path / "run").read_text()
    with pytest.raises(GuardStop):
        start(action="stop", bands=ALWAYS_AFTER_0, patience=2)
    assert len(read_log(tmp_path / "run" / METRICS_NAME)) == 3, "nothing was trained"
    start(action="off")
    assert status(tmp_path)["state"] == "finished"


def test_rollback_ends_at_the_last_evaluation_in_order(start, tmp_path, monkeypatch):
    """Which lies further back than `checkpoint.keep` reaches: it is pinned."""
    kept, saved = {}, Engine.save

    def save(engine):
        path = saved(engine)
        kept.setdefault(path.name, load_file(path / "weights.safetensors"))
        return path

    monkeypatch.setattr(Engine, "save", save)
    with pytest.raises(GuardStop, match="is back at epoch_000001"):
        start(action="rollback", bands=ALWAYS_AFTER_0, patience=3)
    found = status(tmp_path)
    assert (found["state"], found["last_checkpoint"]) == ("stopped", "epoch_000001")
    assert checkpoints(tmp_path) == ["epoch_000001"]
    weights = load_file(tmp_path / "run/checkpoints/epoch_000001/weights.safetensors")
    assert all(torch.equal(weights[name], w) for name, w in kept["epoch_000001"].items())
    assert not all(torch.equal(weights[name], w) for name, w in kept["epoch_000004"].items())
    epochs = [e["epoch"] for e in read_log(tmp_path / "run" / EVALUATIONS_NAME)]
    assert epochs == [0, 1, 2, 3, 4], "what happened is kept"


@pytest.mark.slow
def test_two_ranks_stop_together(tiny_sd3, tmp_path):
    tree = tiny_tree(
        tiny_sd3, tmp_path / "run", run={"dir": str(tmp_path / "run"), "epochs": 4},
        rewards=[{"name": "evaluation.pixel_rewards:ever_better", "weight": 1.0}],
        evaluation={"every": 1, "count": 2, "guard": {"action": "rollback", "bands": ALWAYS_AFTER_0, "patience": 2}},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    done = launch(TRAIN, "--config", tmp_path / "config.yaml", by="torchrun", ranks=2)
    assert done.returncode != 0
    assert "is back at epoch_000001" in done.stderr
    assert (status(tmp_path)["state"], status(tmp_path)["exit_code"]) == ("stopped", 5)
    assert "epoch_000001" in checkpoints(tmp_path)
    assert "epoch_000003" not in checkpoints(tmp_path)


@pytest.fixture(scope="module")
def shapes_runs(tmp_path_factory):
    """The bundled miniature under its own judge, and under a reward for loud colours; the same settings otherwise."""
    base, results = tmp_path_factory.mktemp("shapes"), {}
    for name, reward in (("good", "shapes"), ("hacked", "evaluation.pixel_rewards:loud")):
        words = [
            f"run.dir={base / name}", "run.epochs=8", "sampling.pairs_per_epoch=48", "sampling.steps=4",
            "sampling.churn.weight=0.05", "update.train_steps=4", "update.optimizer_steps=4", "optimizer.lr=5e-4",
            "update.ema=null",
            "evaluation.every=4", "evaluation.count=24", "evaluation.metrics=[]", "log.tensorboard=false",
            f"rewards.0.name={reward}", "evaluation.guard.action=rollback", "evaluation.guard.patience=1",
        ]  # fmt: skip
        try:
            run(load_config("shapes", words))
            results[name] = None
        except GuardStop as stop:
            results[name] = str(stop)
    return base, results


@pytest.mark.slow
@needs_base
@pytest.mark.timeout(1200)
def test_a_hacked_run_is_stopped_and_a_good_one_is_not(shapes_runs):
    base, results = shapes_runs
    assert results["good"] is None
    assert not any(e["guard"] for e in read_log(base / "good" / EVALUATIONS_NAME))
    assert "saturation went from" in results["hacked"]
    evaluations = read_log(base / "hacked" / EVALUATIONS_NAME)
    assert evaluations[-1]["health"]["saturation"] > evaluations[0]["health"]["saturation"]
    assert torch.tensor([r["reward_mean"] for r in read_log(base / "hacked" / METRICS_NAME)]).diff().mean() > 0
