"""Fused blocks in the SD3 family: when they run, how that is said, and that a run is what it was without them."""

import pytest
import torch
from fused_models import build
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.cli.doctor import findings
from fdfo_engine.models.fused import is_fused, unfuse
from fdfo_engine.models.fused.choice import choose_blocks
from fdfo_engine.models.registry import load_model
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fused", "wanted"), [("auto", True), (True, True), (False, False)])
def test_the_setting_decides(tiny_sd3, tmp_path, fused, wanted, capsys):
    model = load_model(tiny_config(tiny_sd3, tmp_path, model={"fused": fused}), CPU)
    assert is_fused(model.network) == wanted
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"fused": True}, UsageError, "model.fused = true: this model does not fit the fused blocks: forward chunking"),
        ({"attention": "flash"}, UsageError, "model.attention = flash: only fused blocks know it, and here forward"),
        ({"gradient_checkpointing": "fc1"}, UsageError, "model.gradient_checkpointing = fc1: only fused blocks"),
    ],
)
def test_a_model_that_does_not_fit(tiny_sd3, tmp_path, setting, error, message):
    network = build("sd3")
    network.enable_forward_chunking(1)
    with pytest.raises(error, match=message):
        choose_blocks(network, tiny_config(tiny_sd3, tmp_path, model=setting).model, rehome=True)


def test_auto_says_once_why_it_does_not_fit(tiny_sd3, tmp_path, capsys):
    network = build("sd3")
    network.enable_forward_chunking(1)
    settings = tiny_config(tiny_sd3, tmp_path, model={"gradient_checkpointing": True}).model
    choose_blocks(network, settings, rehome=True)
    assert capsys.readouterr().out == "model: diffusers' own blocks, not the fused ones: forward chunking is on\n"
    assert network.gradient_checkpointing
    assert not is_fused(network)


def test_attention_that_cannot_run_is_refused(tiny_sd3, tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"model.attention = flash3: .*needs a CUDA device"):
        load_model(tiny_config(tiny_sd3, tmp_path, model={"attention": "flash3"}), CPU)


def trained(folder, run_dir, **model):
    engine = Engine(tiny_config(folder, run_dir, model=model))
    rollout = engine.rollout(PROMPTS)
    metrics = engine.update(rollout, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.2], [1.0, 0.0]]))
    return rollout, metrics, engine


@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_an_epoch_is_that_of_diffusers(tiny_sd3, tmp_path, train):
    exact, plain, _ = trained(tiny_sd3, tmp_path / "a", train=train, fused=False)
    for checkpointing in (False, True, "fc1"):
        folder = tmp_path / str(checkpointing)
        found, metrics, _ = trained(tiny_sd3, folder, train=train, gradient_checkpointing=checkpointing)
        assert (found.images - exact.images).abs().max() < 1e-5
        assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert metrics["log_ratio_floor"] == pytest.approx(plain["log_ratio_floor"], abs=1e-6)


def test_the_first_log_ratio_of_an_epoch_is_zero(tiny_sd3, tmp_path):
    """Rollout and training take the same path: with equal batches the same velocity to the bit."""
    _, metrics, _ = trained(tiny_sd3, tmp_path)
    assert metrics["log_ratio_floor"] < 1e-6


def test_export_and_unfuse_after_training(tiny_sd3, tmp_path):
    _, _, engine = trained(tiny_sd3, tmp_path)
    engine.export(tmp_path / "out")
    images = engine.generate(PROMPTS)
    unfuse(engine.model.network)
    assert (engine.generate(PROMPTS) - images).abs().max() < 1e-5


def test_doctor_lists_attention(tmp_path):
    lines = [finding.line() for finding in findings(tmp_path, quick=True)]
    assert any(line.startswith("ok      attention auto") for line in lines)
    assert any("attention flash3" in line for line in lines)
