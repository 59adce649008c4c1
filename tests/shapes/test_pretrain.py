import json

import pytest
import torch

from fdfo_engine.shapes.autoencoder import AutoencoderSettings
from fdfo_engine.shapes.flow import FlowSettings
from fdfo_engine.shapes.pipeline import load_pipeline
from fdfo_engine.shapes.pretrain import PretrainSettings, Reporting, continue_pretraining, pretrain

SMALL = PretrainSettings(
    autoencoder=AutoencoderSettings(steps=2, batch=2, decoder_share=1.0),
    flow=FlowSettings(steps=2, batch=2, pictures=4),
)
QUIET = Reporting(log_every=1, evaluate_every=2, eval_captions=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "base"
    pretrain(out, seed=1, settings=SMALL, reporting=QUIET)
    return out


def state(folder):
    pipe = load_pipeline(folder)
    return [value for part in (pipe.transformer, pipe.vae, pipe.text_encoder) for value in part.state_dict().values()]


def test_log_holds_whole_lines(trained):
    lines = [json.loads(line) for line in (trained / "pretraining.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [
        "settings",
        *["autoencoder"] * 2,
        *["decoder"] * 2,
        "cache",
        *["flow"] * 2,
    ]
    assert {"step", "seconds", "loss", "score_8", "strict_8", "score_16", "strict_16"} <= set(lines[-1])
    assert [path.name for path in trained.parent.iterdir()] == ["base"]


def test_repeats_by_seed(trained, tmp_path):
    pretrain(tmp_path / "again", seed=1, settings=SMALL, reporting=QUIET)
    assert all(torch.equal(a, b) for a, b in zip(state(trained), state(tmp_path / "again"), strict=True))


def test_reporting_changes_nothing(trained, tmp_path):
    pretrain(tmp_path / "silent", seed=1, settings=SMALL, reporting=Reporting(eval_captions=1))
    assert all(torch.equal(a, b) for a, b in zip(state(trained), state(tmp_path / "silent"), strict=True))


def test_continues_and_keeps_the_autoencoder(trained, tmp_path):
    (trained / "README.md").write_text("card")
    continue_pretraining(trained, tmp_path / "more", steps=2, pictures=4, reporting=QUIET)
    before, after = load_pipeline(trained), load_pipeline(tmp_path / "more")
    same = [torch.equal(a, b) for a, b in zip(before.vae.parameters(), after.vae.parameters(), strict=True)]
    assert all(same)
    assert after.vae.config.scaling_factor == before.vae.config.scaling_factor
    assert not torch.equal(before.transformer.pos_embed.proj.weight, after.transformer.pos_embed.proj.weight)


def test_replacing_keeps_the_card(tmp_path):
    out = tmp_path / "base"
    out.mkdir()
    (out / "README.md").write_text("card")
    (out / "stale.bin").write_text("old")
    pretrain(out, settings=SMALL, reporting=QUIET)
    assert (out / "README.md").read_text() == "card"
    assert not (out / "stale.bin").exists()
