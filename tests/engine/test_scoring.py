"""How a run scores: overlapped or not, it is the same run; what a reward failed on is scored, not sampled, again."""

import json
import os
import signal
import time

import pytest
import torch
import yaml
from engine.launching import TRAIN, launch
from safetensors.torch import load_file
from tiny_sd3 import tiny_config, tiny_tree

from fdfo_engine.loop import run
from fdfo_engine.rewards import background, registry
from fdfo_engine.rollout.sampler import PairedSampler
from fdfo_engine.runtime.durable import sealed_json
from fdfo_engine.runtime.errors import RewardError, Stopped


@pytest.fixture
def sampled(monkeypatch):
    """Pair indices of every block that is sampled."""
    seen, original = [], PairedSampler.sample_block

    def watched(self, network, prompts, pair_ids):
        seen.append(list(pair_ids))
        return original(self, network, prompts, pair_ids)

    monkeypatch.setattr(PairedSampler, "sample_block", watched)
    return seen


@pytest.fixture
def reward(monkeypatch):
    """A registered reward `test_reward`, whose behaviour a test sets."""
    behaviour = {"fail": lambda call: None, "calls": 0}

    def left_bright(prompts, images):
        behaviour["calls"] += 1
        behaviour["fail"](behaviour["calls"])
        left, right = images.chunk(2, -1)
        return 100 * (left - right).flatten(1).mean(1)

    monkeypatch.setitem(registry._registered, "test_reward", left_bright)
    return behaviour


def settings(pipeline, folder, **sections):
    rewards = [{"name": "test_reward", "weight": 1.0}, {"name": "brightness", "weight": -0.5, "normalize": "pair"}]
    return tiny_config(pipeline, folder, **{"rewards": rewards, "run": {"epochs": 3}, **sections})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    timings = ("images_per_second", "time", "eta_seconds", "peak_gib")
    return [{k: v for k, v in r.items() if not k.startswith("seconds") and k not in timings} for r in rows(folder)]


def weights(folder):
    return load_file(folder / "checkpoints/epoch_000003/weights.safetensors")


def assert_same_run(one, other):
    assert untimed(one) == untimed(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_overlapped_or_not_it_is_the_same_run(tiny_sd3, tmp_path, reward):
    for name, overlap in (("with", True), ("without", False)):
        run(settings(tiny_sd3, tmp_path / name, sampling={"overlap_scoring": overlap}))
    assert_same_run(tmp_path / "with", tmp_path / "without")
    row = rows(tmp_path / "with")[0]
    assert row["seconds_reward_waited"] >= 0
    assert row["seconds_reward_hidden"] >= 0
    assert 0 <= row["disagreement_test_reward_brightness"] <= 1


def test_what_a_reward_failed_on_is_scored_again_and_not_sampled_again(tiny_sd3, tmp_path, reward, sampled, capsys):
    run(settings(tiny_sd3, tmp_path / "whole"))
    whole, sampled[:] = list(sampled), []
    reward["calls"] = 0

    def gone(call):
        if call >= 4:  # the second block of epoch 2
            raise RewardError("the server is gone")

    reward["fail"] = gone
    with pytest.raises(RewardError, match="the server is gone"):
        run(settings(tiny_sd3, tmp_path / "broken"))
    assert (tmp_path / "broken/unscored").is_dir()
    assert [row["epoch"] for row in rows(tmp_path / "broken")] == [1]
    reward["fail"] = lambda call: None
    run(settings(tiny_sd3, tmp_path / "broken"))
    assert sampled == whole
    assert not (tmp_path / "broken/unscored").exists()
    assert "scoring again the 4 pairs" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_ranks_stop_together_and_each_keeps_its_part(tiny_sd3, tmp_path):
    files = {}
    for name in ("whole", "broken"):
        rewards = [{"name": "engine.pixel_rewards:gone_on_one_rank", "weight": 1.0}]
        tree = tiny_tree(tiny_sd3, tmp_path / name, rewards=rewards)
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(tree))
    assert launch(TRAIN, "--config", files["whole"], by="torchrun", ranks=2).returncode == 0
    assert launch(TRAIN, "--config", files["broken"], by="torchrun", ranks=2, GONE="1").returncode != 0
    status = json.loads((tmp_path / "broken/status.json").read_text())
    assert (status["exit_code"], status["epoch"]) == (5, 1)
    assert "the server of rank 1 is gone" in status["message"]
    kept = {file.stem for file in (tmp_path / "broken/unscored").iterdir()}
    assert kept == {"rollout_00000", "rollout_00001"}
    again = launch(TRAIN, "--config", files["broken"], by="torchrun", ranks=2)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "scoring again the 4 pairs" in again.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_stopped_while_it_scores_goes_on_there(tiny_sd3, tmp_path, reward, sampled, monkeypatch):
    monkeypatch.setattr(background, "_POLL_S", 0.02)
    run(settings(tiny_sd3, tmp_path / "whole"))
    whole, sampled[:] = list(sampled), []
    reward["calls"] = 0

    def terminated(call):
        if call == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    reward["fail"] = terminated
    with pytest.raises(Stopped, match="while images were scored"):
        run(settings(tiny_sd3, tmp_path / "broken", checkpoint={"every": 3}))
    assert [path.name for path in (tmp_path / "broken/checkpoints").iterdir()] == ["epoch_000001"]
    run(settings(tiny_sd3, tmp_path / "broken", checkpoint={"every": 3}))
    assert sampled == whole
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_model_a_server_and_a_question_train_together(tiny_sd3, tmp_path, capsys):
    """The paper's combination in small, with a server of one's own: from settings to a checkpoint."""
    from rewards.fake_server import FakeServer
    from rewards.tiny_clip import build_tiny_clip
    from rewards.tiny_vlm import build_tiny_llava

    from examples.reward_server import answer

    server = FakeServer(lambda path, request, number: answer(request))
    clip, vlm = str(build_tiny_clip(tmp_path / "clip")), str(build_tiny_llava(tmp_path / "vlm"))
    rewards = [
        {"name": "pickscore", "weight": 1.0, "model": clip, "processor": clip},
        {"name": "vlm_alignment", "weight": 0.1, "model": vlm, "image_size": 28, "dtype": "float32"},
        {"name": server.url, "weight": 1.0, "normalize": "pair"},
    ]
    try:
        run(settings(tiny_sd3, tmp_path / "run", rewards=rewards, run={"epochs": 1}))
    finally:
        server.close()
    (row,) = rows(tmp_path / "run")
    assert row["optimizer_steps"] == 2
    assert row["lost_pairs"] == 0
    assert 0 < row["reward_vlm_alignment_mean"] < 100
    assert 0 < row[f"reward_{server.url}_mean"] < 1
    assert "disagreement_pickscore_vlm_alignment" in row
    assert 0.01 < row["answer_mass_vlm_alignment"] < 1
    assert "pull" in capsys.readouterr().out


def cut_short(file):
    file.write_bytes(b"x" * 100)


def with_a_flipped_bit(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 4  # of the last tensor's numbers, or of the fields
    file.write_bytes(data)


def with_a_field_more(file):
    record = json.loads(file.read_text())
    del record["record_sha256"]
    record["fields"]["colour"] = 1
    file.write_bytes(sealed_json(record, "record_sha256"))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".safetensors", cut_short), (".safetensors", with_a_flipped_bit), (".json", with_a_flipped_bit),
        (".json", with_a_field_more),
    ],
)  # fmt: skip
def test_a_damaged_rollout_is_sampled_again(tiny_sd3, tmp_path, reward, sampled, capsys, suffix, damage):
    def gone(call):
        raise RewardError("the server is gone")

    reward["fail"] = gone
    with pytest.raises(RewardError):
        run(settings(tiny_sd3, tmp_path / "run"))
    damage(tmp_path / f"run/unscored/rollout_00000{suffix}")
    reward["fail"] = lambda call: None
    run(settings(tiny_sd3, tmp_path / "run"))
    assert "sampling again" in capsys.readouterr().err
    assert sampled[:4] == [[0, 1], [2, 3]] * 2
    assert len(rows(tmp_path / "run")) == 3
