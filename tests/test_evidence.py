"""The statistics of the evidence benchmarks, on vectors whose answer is known."""

import pytest
import torch

from benchmarks.convergence import finished, keep
from benchmarks.evidence_axes import NEVER, axes, best_method, drift, is_beyond_spread, paired_differences, reached
from benchmarks.evidence_grid import CELLS, cell_name, main_effect
from benchmarks.evidence_page import compared
from benchmarks.evidence_tasks import TASKS, counted, several_objects
from benchmarks.evidence_trials import chosen_rate, final, options, tuning
from benchmarks.variance import interval, leave_one_out, mean_cosine, signal_to_noise

SIZE = 4_000


def products_of(snr, count=12, seed=0):
    """Inner products of vectors with a common part, and noise of size 1 in all."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(SIZE, generator=generator).double()
    noise = torch.randn(count, SIZE, generator=generator).double() / SIZE**0.5
    vectors = noise + snr**0.5 * common / common.norm()
    return vectors @ vectors.T


@pytest.mark.parametrize("snr", [0.02, 0.5, 10.0])
def test_signal_to_noise_and_cosines_are_those_of_the_construction(snr):
    products = products_of(snr)
    assert signal_to_noise(products) == pytest.approx(snr, rel=0.2, abs=0.01)
    assert mean_cosine(products) == pytest.approx(snr / (1 + snr), rel=0.2, abs=0.01)
    others = snr / ((1 + snr) * (snr + 1 / 11)) ** 0.5
    assert leave_one_out(products) == pytest.approx(others, rel=0.1, abs=0.02)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    truth = 0.3 / 1.3
    hits = 0
    for seed in range(20):
        low, high = interval(products_of(0.3, seed=seed), mean_cosine)
        hits += low <= truth + 0.002 and high >= truth - 0.002
    assert hits >= 13


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_method_is_tuned_with_as_many_trials_and_the_best_is_taken(tmp_path, task):
    names = [trial.name for trial in tuning(task)]
    rates_to_try = len(task.rates) if len(task.rates) > 1 else 0  # one rate needs no trial
    assert len(set(names)) == len(names) == len(task.methods) * rates_to_try
    for trial in tuning(task):
        best = f"lr{task.rates[-1]:g}" in trial.name
        point = {"training_reward": [0.5, 0.9 if best else 0.6], "reward": 0.7}
        keep(tmp_path / "out.json", trial, {"curve": [point]})
    done = finished(tmp_path / "out.json")
    assert list(done) == names
    assert all(chosen_rate(task, method, done) == task.rates[-1] for method in task.methods)
    trials = [*final(task, [0, 1], done), *options(task, [0], done)]
    assert len({trial.name for trial in trials}) == len(trials)
    configs = {trial.name: trial.config(task, str(tmp_path / trial.name)) for trial in trials}
    own_rate = {f"option-{name}-seed0": 6e-5 for name in task.options if name.endswith("lr6e-05")}
    assert {name: config.optimizer.lr for name, config in configs.items()} == {
        name: own_rate.get(name, task.rates[-1]) for name in configs
    }
    assert all(config.run.epochs == task.epochs for config in configs.values())


def test_counting_looks_at_spots_alone():
    image = torch.full((3, 64, 64), 0.5)
    image[0, 4:14, 4:14] = 1.0  # red
    image[2, 30:40, 30:40] = 1.0  # blue
    image[1, 60, 60] = 1.0  # grain
    prompts = ["two red circles", "a red circle", "three cyan squares", "a red square left of a blue circle"]
    assert counted(prompts, image.expand(4, 3, 64, 64)).tolist() == pytest.approx([1, 0, 2 / 3, 1])
    assert len(several_objects()) == 64


def test_the_page_interpolates_where_a_goal_is_reached():
    curve = [
        {"reward": reward, "images": images} for reward, images in ((0.8, 0), (0.85, 480), (0.83, 960), (0.9, 1440))
    ]
    assert reached(curve, 0.84, "images") == pytest.approx(0.8 * 480)
    assert reached(curve, 0.865, "images") == pytest.approx(1200)
    assert reached(curve, 0.95, "images") == NEVER


def record(seed, *rewards):
    """A trial whose diversity falls by half of what its reward gains."""
    curve = [
        {
            "reward": reward, "images": 480 * i, "diversity": {"pixel_diversity": 0.5 - (reward - rewards[0]) / 2},
        }
        for i, reward in enumerate(rewards)
    ]  # fmt: skip
    return {"seed": seed, "curve": curve, "evaluations": 1000}


def test_methods_are_compared_seed_by_seed():
    slow = [record(0, 0.8, 0.82, 0.84), record(1, 0.8, 0.83, 0.86), record(2, 0.8, 0.8, 0.85)]
    fast = [record(2, 0.8, 0.88, 0.9), record(1, 0.8, 0.85, 0.87), record(3, 0.8, 0.9, 0.9)]
    reward, _, _, images, *_, diversity = axes({"fdfo": slow, "nft": fast})[:7]
    assert best_method(reward, {"fdfo": slow, "nft": fast}) == "nft"
    assert paired_differences(reward, slow, fast) == pytest.approx([-0.01, -0.05])
    assert "0.890" in images.name  # 90 % of the way from 0.8 to the median 0.9
    assert paired_differences(images, slow, fast) == [], "the slow ones never get there"
    assert best_method(images, {"fdfo": slow}) == "none"
    # both fall alike, so that they are equal at the highest reward that both medians reach, 0.85
    assert paired_differences(diversity, slow, fast) == pytest.approx([0.0, 0.0])
    assert "0.850" in diversity.name


def test_a_choice_of_the_grid_is_judged_over_the_other_choices():
    gains = {"own": 0.1, "pair": -0.02, "one_noise": 0.0}
    grid = {
        cell_name(cell): [
            record(seed, 0.8, 0.8 + sum(gains.get(value, 0) for value in cell) + 0.01 * seed) for seed in range(3)
        ]
        for cell in CELLS
    }
    effects = [main_effect(grid, axis) for axis in range(3)]
    assert effects == [pytest.approx([gain] * 3) for gain in gains.values()]
    del grid[cell_name(CELLS[5])][1]
    assert len(main_effect(grid, 0)) == 2, "a seed that one cell lacks tells nothing"


@pytest.mark.parametrize(
    ("differences", "verdict"), [([0.1, 0.2, 0.3], True), ([0.1, 0.2], False), ([0.1, -0.1, 0.3], False)]
)
def test_three_seeds_that_differ_alike_are_beyond_the_spread(differences, verdict):
    assert is_beyond_spread(differences) == verdict


def test_drift_is_the_largest_in_spreads_of_the_base():
    base = {"health": {"saturation": 0.4, "clipped": 0.1}, "health_std": {"saturation": 0.1, "clipped": 0.05}}
    last = {"health": {"saturation": 0.45, "clipped": 0.0}, "health_std": {}}
    assert drift([base, last]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("other", "verdict"),
    [([0.0, 0.1], "FDFO's is larger"), ([0.5, 0.6], "FDFO's is smaller"), ([0.25, 0.6], "not told apart")],
)
def test_methods_are_told_apart_where_their_intervals_part(other, verdict):
    fdfo, found = ({"scaled": {"signal_to_noise_interval_90": interval_}} for interval_ in ([0.2, 0.3], other))
    assert compared(fdfo, found) == verdict
