"""The grid of FDFO's choices: its first cell is FDFO, and each choice does what it says."""

import itertools

import pytest
import torch
from tiny_sd3 import tiny_config
from update.test_optimizer_steps import assert_equal_bits

from fdfo_engine import Engine
from fdfo_engine.algorithms import build_algorithm
from fdfo_engine.ops import pair_direction
from fdfo_engine.update.items import Items

PROMPTS = ["a red circle", "two blue dogs", "one cat", "a green square"]
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
ITEMS = Items(torch.tensor([0, 3, 2]), torch.tensor([1, 0, 1]), torch.tensor([0, 2, 3]))
FDFO = ("own", "pair", "one_noise")
CELLS = list(itertools.product(("own", "renoised"), ("pair", "image"), ("one_noise", "two_noises")))


def case(cell):
    """In every run of the tests: cells with one choice made otherwise, and with all three."""
    others = sum(one != other for one, other in zip(cell, FDFO, strict=True))
    return pytest.param(cell, id=", ".join(cell), marks=[] if others in (1, 3) else pytest.mark.slow)


def config_of(folder, run_dir, **choices):
    return tiny_config(folder, run_dir, algorithm={"name": "ablation", **choices})


def test_the_first_cell_is_fdfo_to_the_bit(tiny_sd3, tmp_path):
    weights = []
    for name in ("fdfo", "ablation"):
        with Engine(tiny_config(tiny_sd3, tmp_path / name, algorithm={"name": name})) as engine:
            engine.update(engine.rollout(PROMPTS), REWARDS)
            weights.append({key: value.clone() for key, value in engine.trainer.weights().items()})
    assert_equal_bits(*weights)


@pytest.mark.parametrize("cell", map(case, CELLS))
def test_every_cell_trains_where_and_along_what_it_says(tiny_sd3, tmp_path, cell):
    states, direction, pairing = cell
    config = config_of(tiny_sd3, tmp_path, states=states, direction=direction, pairing=pairing)
    with Engine(config) as engine:
        rollout = engine.rollout(PROMPTS)
        found = build_algorithm(config, "torch").direction(rollout, ITEMS).double()
        pair, branch, step = ITEMS.pair, ITEMS.branch, ITEMS.step
        start = rollout.latents(torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4), torch.zeros(8).long())
        metrics = engine.update(rollout, REWARDS)
    correlation = torch.corrcoef(torch.stack([half.flatten() for half in start.split(4)]))[0, 1]
    if states == "own":
        assert (correlation > 0.8) == (pairing == "one_noise")
        finals = rollout.latents(torch.arange(4).repeat(2), torch.arange(2).repeat_interleave(4), torch.full((8,), 4))
        finals = torch.stack(finals.split(4), 1)
    else:
        finals = rollout.finals
    if direction == "pair":
        exact = pair_direction(finals.cpu(), backend="torch").double()[pair] * (1 - 2 * branch).view(-1, 1, 1, 1)
    else:
        t = rollout.sigmas.double()[step].view(-1, 1, 1, 1)
        line = (rollout.latents(pair, branch, step).double() - finals[pair, branch].double()) / t
        exact = rollout.velocities[pair, branch, step].double() - line
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert metrics["log_ratio_floor"] < 1e-4, "on policy"
    assert metrics["optimizer_steps"] == 2
