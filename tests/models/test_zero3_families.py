"""Every family with all its weights split over ranks: ZeRO-3 gathers what its blocks read."""

import pytest
from engine.launching import launch
from tiny_flux import build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image
from tiny_sd3 import build_tiny_sd3

BUILDERS = {"sd3": build_tiny_sd3, "flux": build_tiny_flux, "qwen_image": build_tiny_qwen_image}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "train", "ranks"),
    [
        *(("sd3", train, ranks) for train in ("lora", "full") for ranks in (1, 2)),
        ("flux", "lora", 2),
        ("flux", "full", 1),
        ("qwen_image", "lora", 2),
    ],
)
def test_an_epoch_is_that_of_whole_weights(tmp_path, family, train, ranks):
    BUILDERS[family](tmp_path / "model")
    done = launch(
        "tests/models/zero3_worker.py", tmp_path / "model", tmp_path, train, "fused", by="torchrun", ranks=ranks
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
