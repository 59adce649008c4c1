from itertools import pairwise

import numpy as np
import pytest
import torch

from fdfo_engine.shapes.autoencoder import AutoencoderSettings, encode_pictures, train_decoder, warm_cosine
from fdfo_engine.shapes.judge import judge
from fdfo_engine.shapes.pipeline import build_pipeline, load_pipeline, shapes_base
from fdfo_engine.shapes.render import render
from fdfo_engine.shapes.scene import captions


def test_rate_warms_up_and_decays():
    rates = [warm_cosine(step, 100, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == 1.0
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_decoder_stage_leaves_the_latents():
    pipe = build_pipeline(seed=4)
    pictures = torch.rand(2, 3, 64, 64)
    before, decoded = encode_pictures(pipe, pictures), pipe.vae.decode(torch.ones(1, 4, 16, 16)).sample
    losses = []
    train_decoder(
        pipe, AutoencoderSettings(steps=2, batch=2, decoder_share=1.0), 0, lambda _, loss: losses.append(loss)
    )
    assert len(losses) == 2
    assert torch.equal(before, encode_pictures(pipe, pictures))
    assert not torch.equal(decoded, pipe.vae.decode(torch.ones(1, 4, 16, 16)).sample)


def test_base_restores_what_the_judge_sees():
    pipe, texts, rng = load_pipeline(shapes_base()), captions("heldout", 64, seed=31), np.random.default_rng(32)
    pictures = torch.from_numpy(np.stack([render(text, rng) for text in texts]))
    with torch.no_grad():
        restored = pipe.vae.decode(encode_pictures(pipe, pictures)).sample / 2 + 0.5
    verdicts = [judge(text, picture) for text, picture in zip(texts, restored.numpy(), strict=True)]
    assert np.mean([verdict.score for verdict in verdicts]) > 0.95
