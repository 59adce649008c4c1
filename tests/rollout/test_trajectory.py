"""What a rollout keeps, and that it is enough: on every backend that an engine can use here."""

import pytest
import torch
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine, ops
from fdfo_engine.runtime.errors import NumericsError
from fdfo_engine.trajectory import Rollout

STEPS = 4
FAST = [name for name in ("triton", "cuda") if torch.cuda.is_available() and not ops.backends()[name]] or ["cpp"]


def make_engine(folder, run_dir, backend, **model):
    return Engine(tiny_config(folder, run_dir, kernels={"backend": backend}, model=model))


@pytest.fixture(params=["torch", *FAST])
def backend(request):
    return request.param


def every_item():
    return torch.cartesian_prod(torch.arange(len(PROMPTS)), torch.arange(2), torch.arange(STEPS + 1)).unbind(1)


def watched_latents(engine, monkeypatch):
    """x that the network is given, step by step, as a list that grows."""
    seen, velocity = [], engine.model.velocity

    def watching(network, latents, timesteps, conditioning):
        seen.append(latents.clone())
        return velocity(network, latents, timesteps, conditioning)

    monkeypatch.setattr(engine.model, "velocity", watching)
    return seen


def test_it_keeps_velocities_in_the_models_dtype_and_no_latents(tiny_sd3, tmp_path, backend):
    rollout = make_engine(tiny_sd3, tmp_path, backend, dtype="bfloat16").rollout(PROMPTS)
    pairs, latent = len(PROMPTS), rollout.direction[0].numel()
    tensors = {name: value for name, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    assert rollout.velocities.dtype == torch.bfloat16
    assert rollout.velocities.untyped_storage().nbytes() == pairs * 2 * STEPS * latent * 2
    grows_with_steps = {name for name, value in tensors.items() if {STEPS, STEPS + 1} & set(value.shape[1:])}
    assert grows_with_steps - {"images", "direction"} == {"velocities", "gammas"}
    assert tensors["gammas"].shape == (pairs, STEPS + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replay_gives_what_the_network_saw(tiny_sd3, tmp_path, backend, dtype, monkeypatch):
    engine = make_engine(tiny_sd3, tmp_path, backend, dtype=dtype)
    seen = watched_latents(engine, monkeypatch)
    rollout = engine.rollout(PROMPTS)
    by_block = torch.stack(seen).view(2, STEPS, 2, 2, *seen[0].shape[1:])  # block, step, pair, branch
    sampled = by_block.transpose(1, 2).flatten(0, 1).transpose(1, 2)  # pair, branch, step
    pair, branch, step = every_item()
    replayed = rollout.latents(pair, branch, step).view(len(PROMPTS), 2, STEPS + 1, *seen[0].shape[1:])
    assert torch.equal(replayed[:, :, :STEPS], sampled)


@pytest.mark.parametrize("name", FAST)
def test_backends_sample_the_same_images(tiny_sd3, tmp_path, name):
    plain, fast = (make_engine(tiny_sd3, tmp_path / b, b).rollout(PROMPTS) for b in ("torch", name))
    items = every_item()
    torch.testing.assert_close(fast.latents(*items), plain.latents(*items), rtol=0, atol=1e-4)
    torch.testing.assert_close(fast.images, plain.images, rtol=0, atol=1e-4)


def test_it_survives_being_stored(tiny_sd3, tmp_path, backend):
    rollout = make_engine(tiny_sd3, tmp_path, backend).rollout(PROMPTS)
    rollout.save(tmp_path / "kept")
    loaded = Rollout.load(tmp_path / "kept")
    assert torch.equal(loaded.latents(*every_item()), rollout.latents(*every_item()))
    assert torch.equal(loaded.images, rollout.images)
    assert loaded.prompts == rollout.prompts


def test_a_velocity_that_is_no_number_is_named_before_any_weight_moves(tiny_sd3, tmp_path, backend, monkeypatch):
    engine = make_engine(tiny_sd3, tmp_path, backend)
    before, calls, velocity = engine.trainer.weights(), [], engine.model.velocity

    def spoilt(network, latents, timesteps, conditioning):
        v = velocity(network, latents, timesteps, conditioning).clone()
        calls.append(None)
        if len(calls) == STEPS + 3:  # third step of the second block
            v[1, 0, 0, 0] = float("nan")
        return v

    monkeypatch.setattr(engine.model, "velocity", spoilt)
    with pytest.raises(NumericsError, match="not finite first at pair 2, branch 1, step 2"):
        engine.rollout(PROMPTS)
    assert all(torch.equal(weight, before[name]) for name, weight in engine.trainer.weights().items())
