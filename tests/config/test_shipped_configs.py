"""Every config that is shipped: valid, and fitting the GPU that it is made for."""

from pathlib import Path

import pytest

from fdfo_engine.config import BatchPlan, load_config
from fdfo_engine.planning.fit import reward_bytes
from fdfo_engine.planning.footprint import blank_footprint
from fdfo_engine.planning.memory import GIB, choose_micro_batch

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
CARDS = {"sd35m_16gb": 16, "flux1_dev_24gb": 24, "sd35m_combined": 48, "sd35m_pickscore": 48, "sd35m_vlm": 48}
LARGEST = 80
QUICK = ("shapes",)


def gpu_gb(path):
    return CARDS.get(path.stem, LARGEST)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_valid_and_divides_over_ranks(path):
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"
    for ranks in (1, 2, 3, 4):
        plan = BatchPlan.from_config(config, ranks)
        items = 2 * plan.pairs_per_epoch * plan.trained_steps
        assert plan.items_per_optimizer_step * plan.optimizer_steps == items


@pytest.mark.parametrize("guidance", [1.0, 2.0, 4.5])
@pytest.mark.parametrize("name", ["combined", "pickscore", "vlm"])
def test_the_papers_settings(name, guidance):
    config = load_config(f"sd35m_{name}", [f"sampling.guidance_scale={guidance}"])
    sampling, update, optimizer = config.sampling, config.update, config.optimizer
    assert (sampling.pairs_per_epoch, sampling.steps, sampling.guidance_scale) == (432, 40, guidance)
    assert config.model.max_sequence_length == 128
    assert (config.model.height, config.model.width, config.lora.rank, config.lora.alpha) == (512, 512, 32, 64)
    assert (update.optimizer_steps, update.clip_range, update.train_steps) == (4, 0.03, None)
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (3e-5, (0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, sampling.churn.weight) == (1e-4, 1.0, 0.0025)
    weights = {"combined": [1.0, 0.1], "pickscore": [1.0], "vlm": [1.0]}[name]
    assert [reward.weight for reward in config.rewards] == weights


@pytest.mark.parametrize(
    "path",
    [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_it_fits_its_gpu_by_plan(path):
    config = load_config(path)
    free = gpu_gb(path) * GIB
    assert choose_micro_batch(blank_footprint(config), config, 1, free, reward_bytes(config)).needed <= free
