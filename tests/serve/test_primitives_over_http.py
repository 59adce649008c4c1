"""A training loop on the primitives is `Engine.update`, over HTTP too; it may use any loss of the log-ratios."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from serve.serving import served, shapes_config, start_process, waited_for
from update.test_primitives import ppo_weights

from fdfo_engine import Engine
from fdfo_engine.rollout.prompts import load_prompts
from fdfo_engine.runtime.base_record import recorded_base
from fdfo_engine.runtime.picture import to_picture

EPOCHS = 3


def redness(png):
    """A client's reward: of the eight-bit picture, as a server sends it."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float64)
    return float(pixels[..., 0].mean() - pixels[..., 1:].mean())


def as_png(image):
    buffer = io.BytesIO()
    to_picture(image).save(buffer, "PNG")
    return buffer.getvalue()


def scored(client, pairs):
    return {pair["pair_id"]: [redness(client.image(image)) for image in pair["images"]] for pair in pairs}


@pytest.fixture(scope="module")
def by_update(tmp_path_factory):
    """Checkpoints of three epochs of `Engine.update` in process."""
    folder = tmp_path_factory.mktemp("update")
    config = shapes_config(folder, "checkpoint.keep=3")
    engine, prompts = Engine(config), load_prompts(config.prompts, config.run.seed)
    for _ in range(EPOCHS):
        rollout = engine.rollout(prompts.of_pairs(range(engine.next_pair, engine.next_pair + 4)))
        rewards = [[redness(as_png(image)) for image in pair] for pair in rollout.images]
        engine.update(rollout, torch.tensor(rewards, dtype=torch.float64))
        engine.save()
    return folder


def assert_same_checkpoints(one, other, epochs=EPOCHS):
    for epoch in range(1, epochs + 1):
        for stem in ("weights", "optimizer", "ema"):
            left, right = (load_file(f / f"checkpoints/epoch_{epoch:06d}/{stem}.safetensors") for f in (one, other))
            assert left.keys() == right.keys()
            assert all(left[name].equal(right[name]) for name in left), (epoch, stem)


def train_by_primitives(client):
    for epoch in range(1, EPOCHS + 1):
        sampled = client.sample()
        rewards = scored(client, sampled["pairs"])
        for part in range(client.capabilities()["parts"]):
            answer = client.forward_backward(sampled["round"], rewards=rewards, part=part)
            assert answer["items"] == 16
            assert client.optim_step()["applied"]
        assert client.snapshot()["epoch"] == epoch


def test_primitives_over_http_give_the_bits_of_update(by_update, tmp_path):
    with served(shapes_config(tmp_path, "checkpoint.keep=3")) as client:
        train_by_primitives(client)
    assert_same_checkpoints(by_update, tmp_path)
    assert recorded_base(tmp_path) == recorded_base(by_update) is not None


def test_feedback_by_scores_trains_as_update_does(by_update, tmp_path):
    with served(shapes_config(tmp_path, "checkpoint.keep=3")) as client:
        for _ in range(EPOCHS):
            sampled = client.create_round()
            judgements = [
                {
                    "pair_id": pair["pair_id"],
                    "scores": {image: redness(client.image(image)) for image in pair["images"]},
                }
                for pair in sampled["pairs"]
            ]
            client.feedback(sampled["round"], judgements)
            client.train(sampled["round"])
    assert_same_checkpoints(by_update, tmp_path)


def test_a_clients_own_loss_has_the_gradient_it_has_in_process(tmp_path):
    """PPO's clip from the answer of `forward`; `update.test_primitives` holds the same weights against autograd."""
    advantages = torch.tensor([[1.0, -1.0], [0.5, -0.5], [-2.0, 2.0], [0.25, -0.25]]).double()[:, :, None]
    engine = Engine(shapes_config(tmp_path / "engine"))
    rollout = engine.rollout(["a red circle", "a blue square", "two green circles", "a red triangle"])
    with served(shapes_config(tmp_path / "served")) as client:
        sampled = client.sample(rollout.prompts)
        table = {pair["pair_id"]: a.flatten().tolist() for pair, a in zip(sampled["pairs"], advantages, strict=True)}
        client.forward_backward(sampled["round"], advantages=table, part=0)
        client.optim_step()
        found = client.forward(sampled["round"], part=1)
        ratios = torch.tensor([found["log_ratios"][str(pair)] for pair in table])
        clip = ratios.abs().median().item()
        weights = ppo_weights(ratios, advantages, clip)
        answer = client.forward_backward(
            sampled["round"], weights={pair: w.tolist() for pair, w in zip(table, weights, strict=True)}, part=1
        )
        step = client.optim_step()

    engine.primitives.forward_backward(rollout, advantages=advantages.squeeze(2), part=0)
    engine.primitives.optim_step()
    own = engine.primitives.forward(rollout, part=1)
    assert torch.equal(own.values, ratios)
    assert own.steps.tolist() == [found["steps"][str(pair)] for pair in table]
    expected = engine.primitives.forward_backward(rollout, weights=ppo_weights(own.values, advantages, clip), part=1)
    assert answer == expected
    assert step["grad_norm"] == engine.primitives.optim_step().grad_norm > 0


@pytest.mark.slow
def test_two_ranks_train_as_one_within_the_methods_bounds(by_update, tmp_path):
    """Real processes under the launcher: latents of the first epoch to the bit, weights to 1e-3 of their change."""
    process = start_process(tmp_path / "run", "checkpoint.keep=3", ranks=2, log=tmp_path / "log.txt")
    try:
        with waited_for(tmp_path / "run", lambda: process.poll() is None) as client:
            assert client.capabilities()["ranks"] == 2
            train_by_primitives(client)
    finally:
        process.terminate()
        assert process.wait(120) == 75
    one, two = (
        load_file(folder / "checkpoints/epoch_000003/weights.safetensors") for folder in (by_update, tmp_path / "run")
    )
    start = Engine(shapes_config(tmp_path / "start")).trainer.weights()
    change = norm(one[name] - start[name] for name in one)
    assert norm(one[name] - two[name] for name in one) < 1e-3 * change


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()
