"""What a whole run writes down of its epochs, and which of them it saves and draws: against the scores themselves."""

import json

import numpy as np
import pytest
from tiny_sd3 import tiny_config

from fdfo_engine.loop import run
from fdfo_engine.runtime.run_folder import checkpoint_store, read_log


@pytest.fixture(scope="module")
def finished(tiny_sd3, tmp_path_factory):
    """Three epochs of four pairs, saved every second one, with two rewards; and every score that they gave."""
    folder, given = tmp_path_factory.mktemp("lines") / "run", {"up": [], "down": []}

    def up(prompts, images):
        given["up"] += images.flatten(1).mean(1).tolist()
        return images.flatten(1).mean(1)

    def down(prompts, images):
        given["down"] += (10 * images[:, 0].flatten(1).std(1)).tolist()
        return 10 * images[:, 0].flatten(1).std(1)

    config = tiny_config(
        tiny_sd3, folder, checkpoint={"every": 2}, log={"images_every": 2, "tensorboard": False}, update={"ema": 0.9},
    )  # fmt: skip
    told = []
    lines = run(config, rewards=[up, down], on_event=told.append)
    return folder, lines, {name: np.array(scores).reshape(3, 4, 2) for name, scores in given.items()}, told


def test_epochs_are_saved_at_their_interval_and_the_last_one_always(finished):
    folder, _, _, told = finished
    assert checkpoint_store(folder).names() == ["epoch_000002", "epoch_000003"]
    assert [event.data.epoch for event in told if event.type == "checkpoint"] == [2, 3]
    state = json.loads((folder / "checkpoints/epoch_000003/state.json").read_text())
    assert (state["epoch"], state["next_pair"], state["world_size"]) == (3, 12, 1)
    assert (folder / "checkpoints/epoch_000002/ema.safetensors").is_file()


def test_pictures_are_drawn_at_their_interval(finished):
    folder, _, _, _ = finished
    assert sorted(path.stem for path in folder.rglob("pairs_epoch_*.png")) == ["pairs_epoch_000002"]


def test_a_line_has_the_means_and_the_spread_of_the_scores(finished):
    _, lines, given, _ = finished
    total = given["up"] + given["down"]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line, sums, up, down in zip(lines, total, given["up"], given["down"], strict=True):
        assert line["reward_mean"] == pytest.approx(sums.mean(), rel=1e-5)
        assert line["reward_std"] == pytest.approx(sums.std(ddof=1), rel=1e-4)
        means = [value for name, value in line.items() if name.startswith("reward_") and name.endswith("up_mean")]
        assert means == [pytest.approx(up.mean(), rel=1e-5)]
        half = (sums[:, 0] - sums[:, 1]) / 2
        assert line["advantage_abs_mean"] == pytest.approx(np.abs(half).mean(), rel=1e-3)
        (disagreement,) = (value for name, value in line.items() if name.startswith("disagreement_"))
        assert disagreement == np.mean(np.sign(up[:, 0] - up[:, 1]) != np.sign(down[:, 0] - down[:, 1]))


def test_a_line_has_its_pairs_its_pace_and_its_rate(finished):
    folder, lines, _, _ = finished
    for number, line in enumerate(lines):
        assert (line["first_pair"], line["pairs"], line["lr"]) == (4 * number, 4, 1e-3)
        assert line["images_per_second"] == pytest.approx(8 / line["seconds_rollout"], rel=1e-6)
        assert line["optimizer_steps"] == 2
        assert line["trained_items"] == 32
        assert line["micro_batch"] == 5
    assert read_log(folder / "metrics.jsonl") == json.loads(json.dumps(lines))
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["epoch"], status["last_checkpoint"]) == ("finished", 3, "epoch_000003")
    assert status["reward_mean"] == pytest.approx(lines[-1]["reward_mean"])
