"""A model counted from its configs alone is the model that loads."""

import pytest
import torch
from tiny_sd3 import tiny_config

from fdfo_engine.cli.main import main
from fdfo_engine.models.registry import load_model
from fdfo_engine.planning.footprint import blank_footprint, footprint
from fdfo_engine.runtime.errors import UsageError


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in ({"train": "full"}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"})
        ),
    ],
    ids=str,
)
def test_sizes_are_those_of_the_loaded_model(tiny_sd3, tmp_path, settings):
    config = tiny_config(tiny_sd3, tmp_path / "run", model={"fused": False} | settings)
    model = load_model(config, torch.device("cpu"))
    loaded = footprint(model, model.encode_prompt("a red circle"), config.model.height, config.model.width)
    assert blank_footprint(config) == loaded
    assert all(p.grad is None for p in model.network.parameters())


def test_checkpointing_keeps_less(tiny_sd3, tmp_path):
    plain, lean = (
        blank_footprint(tiny_config(tiny_sd3, tmp_path, model={"gradient_checkpointing": on})) for on in (False, True)
    )
    assert lean.training.each < plain.training.each
    assert lean.forward == plain.forward


def test_fused_blocks_keep_less_than_is_planned(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run")
    model = load_model(config, torch.device("cpu"))
    fused = footprint(model, model.encode_prompt("a red circle"), config.model.height, config.model.width)
    assert fused.training.each < blank_footprint(config).training.each


@pytest.mark.parametrize(
    "model", [{"quantize": "nf4", "fused": True}, {"fused": False, "gradient_checkpointing": "fc1"}], ids=str
)
def test_what_would_not_load_is_not_planned(tiny_sd3, tmp_path, model):
    config = tiny_config(tiny_sd3, tmp_path, model=model)
    for load in (lambda c: load_model(c, torch.device("cpu")), blank_footprint):
        with pytest.raises(UsageError, match="fused"):
            load(config)


@pytest.mark.slow
def test_plan_verb(tmp_path, capsys):
    run = ["run.epochs=10", f"run.dir={tmp_path}"]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"epoch": {n}, "seconds_total": {720 * n}}}\n' for n in (1, 2, 3))
    )
    assert main(["plan", "--config", "shapes", "--ranks", "2", *run]) == 0
    text = capsys.readouterr().out
    first = text.splitlines()[0]
    assert first.startswith("fits: ")
    assert " of 80 GiB on 2 GPUs; " in first
    assert f"4.0 hours for 10 epochs at the pace of the 3 in {tmp_path}" in first
    assert "2 ranks; " in text
    assert "micro-batches: 24 items" in text
    assert "GiB at the peak" in text
    slow = ["update.micro_batch=24", "--passes-per-second", "10"]
    assert main(["plan", "--config", "shapes", "--gpu-gb", "0.5", *slow, *run]) == 2
    evaluations = 2 * 96 * 8 + 2 * 96 * 4  # sampling and training, an epoch
    said = capsys.readouterr()
    assert said.out.startswith("does not fit: ")
    assert f"; {10 * evaluations / 10 / 3600:.1f} hours for 10 epochs at 10 passes a second" in said.out
    assert "update.micro_batch" in said.err
    assert main(["plan", "--config", "shapes", "--ranks", "0"]) == 2
    assert main(["plan", "--config", "shapes", "--gpu-gb", "nan"]) == 2
