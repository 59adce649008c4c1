"""The run as a user interface sees it: it trains as `fdfo train` does, pauses, stops, and goes on."""

import time

import pytest
from safetensors.torch import load_file
from serve.serving import lines, served, shapes_config

from fdfo_engine import run

EVALUATED = ("evaluation.every=2", "evaluation.count=2", "checkpoint.keep=4", "checkpoint.every=1")


def wait_until_idle(client, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while (state := client.run())["state"] != "idle":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return state


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three epochs by `fdfo_engine.run`."""
    folder = tmp_path_factory.mktemp("trained")
    run(shapes_config(folder, *EVALUATED))
    return folder


def without_times(rows):
    return [{k: v for k, v in row.items() if "second" not in k and "gib" not in k} for row in rows]


def test_a_started_run_trains_evaluates_and_logs_as_fdfo_train_does(trained, tmp_path):
    with served(shapes_config(tmp_path, *EVALUATED)) as client:
        assert client.run()["state"] == "idle"
        assert client.start()["state"] == "running"
        state = wait_until_idle(client)
        assert (state["epoch"], state["last_checkpoint"], state.get("error")) == (3, "epoch_000003", None)
        assert b"<html" in client.report()
        assert without_times(client.metrics()["epochs"]) == without_times(lines(trained / "metrics.jsonl"))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert without_times(lines(tmp_path / name)) == without_times(lines(trained / name))
    for stem in ("weights", "optimizer", "ema"):
        one, other = (load_file(f / f"checkpoints/epoch_000003/{stem}.safetensors") for f in (trained, tmp_path))
        assert all(one[name].equal(other[name]) for name in one)


def test_pause_stop_and_operations_between_its_epochs(tmp_path):
    with served(shapes_config(tmp_path, "run.epochs=1000")) as client:
        client.start()
        while client.run()["epoch"] < 1:
            time.sleep(0.02)
        (png,) = client.generate("a red circle")  # an operation between two epochs
        assert png.startswith(b"\x89PNG")
        client.pause()
        paused = wait_until_idle(client)
        assert paused["last_checkpoint"] == f"epoch_{paused['epoch']:06d}"
        client.start()
        while client.run().get("phase") is None:
            time.sleep(0.01)
        client.stop()
        stopped = wait_until_idle(client)
        assert stopped["epoch"] >= paused["epoch"]
        assert stopped["next_pair"] == 4 * stopped["epoch"]
        sampled = client.create_round(count=2)
        judgements = [{"pair_id": pair["pair_id"], "choice": "left"} for pair in sampled["pairs"]]
        client.feedback(sampled["round"], judgements)
        assert client.train(sampled["round"])["epoch"] == stopped["epoch"] + 1


def test_what_a_restart_finds(tmp_path):
    config = shapes_config(tmp_path, "run.epochs=1000", "checkpoint.every=5")
    with served(config) as client:
        sampled = client.create_round(count=2)
        name, pair = sampled["round"], sampled["pairs"][0]["pair_id"]
        client.feedback(name, [{"pair_id": pair, "choice": "tie"}], rater="ann")
        images = [client.image(image) for image in sampled["pairs"][0]["images"]]
        before = client.events(after=0)
        first = next(before)
        before.close()
        count = client.run()
    with served(config) as client:
        assert client.run() == count
        assert client.round(name)["labelled"] == 1
        assert [client.image(image) for image in sampled["pairs"][0]["images"]] == images
        assert client.pairs(name, rater="ann", unlabelled=True)[0]["pair_id"] != pair
        events = client.events(after=0)
        assert next(events) == first
        events.close()
        client.feedback(name, [{"pair_id": pair, "choice": "left"}], rater="ann")
        assert client.train(name)["epoch"] == 1
