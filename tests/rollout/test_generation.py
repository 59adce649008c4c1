"""Images without churn, against the same in float64: plain Euler from the noise of METHOD's generation stream."""

import pytest
import torch
from ops import exact
from tiny_sd3 import tiny_config
from update.epoch_oracle import EpochOracle

from fdfo_engine import Engine
from fdfo_engine.rollout import sampler as sampler_module
from fdfo_engine.runtime.errors import NumericsError

PROMPTS = ["a red circle", "two blue dogs", "one cat", "a green square", "a red circle"]
GENERATION = 2**30


@pytest.fixture(scope="module")
def engine(tiny_sd3, tmp_path_factory):
    config = tiny_config(
        tiny_sd3, tmp_path_factory.mktemp("run"), model={"negative_prompt": "a blue dog"}, evaluation={"batch": 2}
    )
    return Engine(config)


@torch.no_grad()
def exactly(engine, index, prompt, *, seed, steps, guidance):
    oracle = EpochOracle(engine.config, {})
    oracle.pipeline.scheduler.set_timesteps(steps)
    sigmas = oracle.pipeline.scheduler.sigmas.double().tolist()
    x = torch.from_numpy(exact.noise((4, 8, 8), seed=seed, pair=index, stream=GENERATION))
    for i in range(steps):
        v = oracle.velocity(x, i, prompt)
        if guidance != 1.0:
            negative = oracle.velocity(x, i, "a blue dog")
            v = negative + guidance * (v - negative)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    oracle.x = [[[x.numpy()], [x.numpy()]]]
    return oracle.images()[0, 0]


@pytest.mark.parametrize(("steps", "guidance"), [(3, 1.0), (2, 3.0)])
def test_an_image_is_that_of_its_seed_index_and_guidance(engine, steps, guidance):
    found = engine.generate(PROMPTS, seed=9, first=40, steps=steps, guidance_scale=guidance)
    assert found.shape == (5, 3, 16, 16)
    for row in (0, 4):
        wanted = exactly(engine, 40 + row, PROMPTS[row], seed=9, steps=steps, guidance=guidance)
        assert (found[row] - wanted).abs().max() < 2e-5
    assert not torch.equal(found[0], found[4]), "the same prompt, other noise"


def test_a_list_may_be_cut_at_batches_and_has_the_runs_steps_by_default(engine):
    whole = engine.generate(PROMPTS, seed=1)
    assert torch.equal(engine.generate(PROMPTS[2:], seed=1, first=2), whole[2:])
    assert torch.equal(engine.generate(PROMPTS[:2], seed=1, steps=4, guidance_scale=1.0), whole[:2])
    assert not torch.equal(engine.generate(PROMPTS[:2], seed=2), whole[:2])


def test_latents_are_decoded_a_few_at_a_time(engine, monkeypatch):
    """The VAE takes more memory an image than the network does."""
    sizes, decode = [], engine.model.decode
    monkeypatch.setattr(engine.model, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    images = engine.sampler._decode(torch.zeros(9, 4, 8, 8), [str(row) for row in range(9)])
    assert (sizes, len(images)) == ([4, 4, 1], 9)
    assert sampler_module.DECODE_IMAGES == 4


def test_of_velocities_that_are_no_numbers_the_first_in_time_is_named(engine):
    """Pair 1 was spoilt two steps before pair 0: it is the one to look at."""
    velocities = torch.zeros(2, 2, 4, 4, 8, 8)
    velocities[0, 0, 3, 0, 0, 0] = velocities[1, 1, 1, 2, 3, 4] = float("inf")
    velocities[1, 1, 2:] = float("nan")
    latents = torch.full((2, 2, 4, 8, 8), float("nan"))
    with pytest.raises(NumericsError, match="not finite first at pair 8, branch 1, step 1"):
        engine.sampler._check_latents(latents, velocities, [7, 8])
    with pytest.raises(NumericsError, match="overflowed though every velocity was finite"):
        engine.sampler._check_latents(latents, torch.zeros_like(velocities), [7, 8])
    engine.sampler._check_latents(torch.zeros_like(latents), torch.zeros_like(velocities), [7, 8])


def test_a_spoilt_image_is_named_by_its_index(engine, monkeypatch):
    velocity = engine.model.velocity

    def spoilt(network, latents, timesteps, conditioning):
        v = velocity(network, latents, timesteps, conditioning).clone()
        v[1] = float("nan")
        return v

    monkeypatch.setattr(engine.model, "velocity", spoilt)
    with pytest.raises(NumericsError, match="first at image 6, step 0"):
        engine.generate(PROMPTS[:2], first=5)


def test_rows_of_a_pair_stand_beside_each_other(engine):
    """Both branches see the prompt of their pair; a negative prompt stands beside each where there is guidance."""
    positive, negative = engine.sampler.conditioning(["a red circle", "one cat"], copies=2, guidance=2.0)
    for name, rows in positive.tensors.items():
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[2], rows[3])
        assert not torch.equal(rows[1], rows[2])
        assert len(negative.tensors[name]) == 4
        assert all(torch.equal(negative.tensors[name][0], row) for row in negative.tensors[name])
    assert engine.sampler.conditioning(["one cat"], guidance=1.0)[1] is None
