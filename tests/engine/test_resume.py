"""A killed run, started again by the same command, ends as if it had not been killed."""

import json
import signal

import pytest
import yaml
from engine.launching import TRAIN, launch
from safetensors.torch import load_file
from tiny_sd3 import tiny_tree

from fdfo_engine.runtime.event_log import read_events

EPOCHS = 5
TIMINGS = ("images_per_second", "time", "eta_seconds", "peak_gib")


def start(config, record, kill_at_call=0):
    return launch(TRAIN, "--config", config, RECORD=str(record), KILL_AT_CALL=str(kill_at_call))


def write_config(pipeline, folder, **sections):
    tree = tiny_tree(
        pipeline, folder / "run", run={"dir": str(folder / "run"), "seed": 5, "epochs": EPOCHS},
        rewards=[{"name": "engine.pixel_rewards:left_bright", "weight": 1.0}], checkpoint={"every": 2},
        update={"ema": 0.9}, evaluation={"every": 2, "count": 2}, **sections,
    )  # fmt: skip
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and k not in TIMINGS} for row in rows]


@pytest.fixture(scope="module")
def runs(tiny_sd3, tmp_path_factory):
    return whole_and_broken(tiny_sd3, tmp_path_factory.mktemp("runs"))


def whole_and_broken(pipeline, base, **sections):
    """Folders of an uninterrupted run, and of one killed while it scored epoch 4, after the checkpoint of epoch 2."""
    whole, broken = (base / name for name in ("whole", "broken"))
    done = start(write_config(pipeline, whole, **sections), base / "whole.txt")
    assert done.returncode == 0, done.stderr[-3000:]
    config = write_config(pipeline, broken, **sections)
    # calls: an evaluation before epoch 1, two blocks of epochs 1 and 2, the evaluation after 2, blocks of 3 and 4
    killed = start(config, base / "killed.txt", kill_at_call=10)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert [row["epoch"] for row in lines(broken / "run" / "metrics.jsonl")] == [1, 2, 3]
    again = start(config, base / "again.txt")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming after epoch 2" in again.stdout + again.stderr
    return base


def require_same_bits(runs):
    for stem in ("weights", "optimizer", "ema"):
        one, other = (load_file(runs / r / f"run/checkpoints/epoch_00000{EPOCHS}/{stem}.safetensors")
                      for r in ("whole", "broken"))  # fmt: skip
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one), stem


def test_weights_moments_and_average_have_the_same_bits(runs):
    require_same_bits(runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "flow_grpo"}, {"name": "awm"}, {"name": "nft"},
        {"name": "fdfo", "importance_share": 0.5, "branch_noise": "antithetic", "advantage_scale": "spread"},
    ],
    ids=lambda algorithm: algorithm["name"],
)  # fmt: skip
def test_every_algorithm_goes_on_after_a_kill_to_the_same_bits(tiny_sd3, tmp_path, algorithm):
    churn = {"schedule": "raw", "weight": 0.0025}  # the default, which all take
    sampling = {"pairs_per_prompt": 2, "churn": churn}
    require_same_bits(whole_and_broken(tiny_sd3, tmp_path, algorithm=algorithm, sampling=sampling))


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_logs_are_the_same_and_no_line_is_doubled(runs, name):
    whole, broken = (lines(runs / run / "run" / name) for run in ("whole", "broken"))
    epochs = [row["epoch"] for row in whole]
    assert epochs == sorted(set(epochs))
    assert broken == whole


def test_events_are_numbered_by_line_and_tell_each_epoch_once(runs):
    whole, broken = (list(read_events(runs / run / "run")) for run in ("whole", "broken"))
    for told in (whole, broken):
        assert [event.seq for event in told] == list(range(1, len(told) + 1))
        assert (told[-1].type, told[-1].data.state) == ("done", "finished")
    metrics = [[(e.data.kind, e.data.epoch) for e in told if e.type == "metrics"] for told in (whole, broken)]
    assert metrics[0] == metrics[1]
    starts = [event.data.epoch for event in broken if event.type == "state" and event.data.state == "running"]
    assert starts == [0, 2]


def test_nothing_before_the_checkpoint_is_sampled_again(runs):
    """By hashes of the images that were scored: the second process scored epochs 3 to 5 and evaluations 4 and 5."""
    whole, again = ((runs / f"{run}.txt").read_text().splitlines() for run in ("whole", "again"))
    assert len(set(whole)) == len(whole)
    assert again == whole[-len(again) :]
    assert len(again) == 3 * 2 + 2


def test_both_checkpoints_left_are_the_same(runs):
    names = [sorted(p.name for p in (runs / run / "run/checkpoints").iterdir()) for run in ("whole", "broken")]
    assert names[0] == names[1] == ["epoch_000004", "epoch_000005"]


def test_status_says_finished(runs):
    for run in ("whole", "broken"):
        status = json.loads((runs / run / "run/status.json").read_text())
        assert (status["state"], status["exit_code"], status["epoch"]) == ("finished", 0, EPOCHS)


@pytest.mark.slow
def test_the_same_command_on_a_finished_run_changes_nothing(runs):
    before = (runs / "broken/run/metrics.jsonl").read_bytes()
    done = start(runs / "broken/config.yaml", runs / "idle.txt")
    assert done.returncode == 0
    assert "finished already" in done.stdout + done.stderr
    assert (runs / "broken/run/metrics.jsonl").read_bytes() == before
    assert not (runs / "idle.txt").exists()
    assert "pair ops run on" not in done.stdout  # said once a model is loaded
    assert json.loads((runs / "broken/run/status.json").read_text())["epoch"] == EPOCHS
