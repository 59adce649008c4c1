"""A damaged newest checkpoint: the one before it is taken, or with `strict_resume` the run does not begin."""

import pytest
from tiny_sd3 import tiny_config

from fdfo_engine.loop import run
from fdfo_engine.runtime.errors import CheckpointError


def test_only_a_strict_resume_refuses_the_one_before(tiny_sd3, tmp_path, capsys):
    def settings(epochs):
        return tiny_config(tiny_sd3, tmp_path / "run", run={"epochs": epochs})

    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        run(settings(2), strict_resume=True)
    run(settings(2))
    newest = tmp_path / "run/checkpoints/epoch_000002/weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"epoch_000002: .* has SHA-256") as caught:
        run(settings(3), strict_resume=True)
    assert caught.value.exit_code == 7
    assert [row["epoch"] for row in run(settings(3))] == [1, 2, 3]
    assert "epoch_000002 is damaged and left out" in capsys.readouterr().err
