"""The micro-batch that was chosen is part of a run: it is in its bits."""

from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.runtime.distributed import close_distributed


def test_a_resume_takes_the_size_that_the_run_began_with(tiny_sd3, tmp_path):
    config = tiny_config(tiny_sd3, tmp_path / "run", update={"optimizer_steps": 2, "micro_batch": "auto"})
    engine = Engine(config)
    assert (engine.micro_batch, engine.memory is None) == (24, engine.device.type == "cpu")
    engine._updater.micro_batch = 3  # as a GPU with little free memory would choose
    engine.save()
    again = Engine(config)
    assert again.load()
    assert again.micro_batch == 3


def test_an_engine_after_the_group_was_closed(tiny_sd3, tmp_path):
    for name in ("first", "second"):
        engine = Engine(tiny_config(tiny_sd3, tmp_path / name))
        assert engine.rollout(PROMPTS).images.isfinite().all()
        close_distributed()
