"""Metrics of an update, each held against its definition on numbers that are written out here."""

import math

import pytest
import torch

from fdfo_engine.update.advantage import Advantage
from fdfo_engine.update.totals import StepResult, Totals, update_metrics

CLIP = 0.03


def counted(*batches):
    totals = Totals.zero(torch.device("cpu"))
    for ratios in batches:
        totals.count_items(torch.tensor(0.5), torch.tensor(ratios, dtype=torch.float64), torch.tensor(0.25), CLIP)
    return totals


def test_items_beyond_the_clip_range_are_counted_on_both_sides():
    inside, outside = [0.0, 0.029, -0.03], [math.log(1.031), math.log(0.969), -5.0]
    summary = counted([*inside, outside[0]], outside[1:]).over_ranks()
    assert summary.items == 6
    assert summary.clip_fraction == 3 / 6


def test_the_limit_itself_counts_as_clipped():
    ratio = math.log(1.5)
    totals = Totals.zero(torch.device("cpu"))
    totals.count_items(torch.zeros(()), torch.tensor([ratio], dtype=torch.float64), torch.zeros(()), 0.5)
    assert totals.over_ranks().clip_fraction == 1.0


def test_log_ratios_have_mean_floor_and_largest():
    summary = (totals := counted([0.01, -0.03], [0.5, -0.7, 0.1])).over_ranks()
    assert summary.log_ratio_mean == pytest.approx((0.01 - 0.03 + 0.5 - 0.7 + 0.1) / 5)
    assert summary.log_ratio_largest == pytest.approx(0.7)
    assert totals.floor == pytest.approx(0.02)  # of the first micro-batch alone
    assert (summary.loss, summary.divergence) == (1.0, 0.5)  # sums over micro-batches


def test_nothing_counted_is_zero_and_not_a_division_by_it():
    summary = counted().over_ranks()
    assert (summary.items, summary.clip_fraction, summary.log_ratio_mean) == (0, 0.0, 0.0)


def test_optimiser_steps_are_applied_skipped_or_left_out():
    totals = counted([0.0])
    for step in (
        StepResult(2.0, applied=True), StepResult(4.0, applied=True), StepResult(float("nan"), applied=False),
        StepResult(0.0, applied=False, left_out=True),
    ):  # fmt: skip
        totals.count_step(step)
    pairs = torch.tensor([[2.0, -2.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    lost, tied, still = (torch.tensor(rows, dtype=torch.bool) for rows in ([0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5))
    metrics = update_metrics(totals, Advantage(pairs, lost, tied, still), 4, 1.5)
    assert (metrics["optimizer_steps"], metrics["skipped_steps"], metrics["left_out_steps"]) == (2, 1, 1)
    assert metrics["grad_norm"] == 3.0
    assert metrics["log_ratio_floor"] == 0.0
    assert metrics["log_ratio_mean"] == metrics["log_ratio_largest"] == metrics["clip_fraction"] == 0.0
    assert metrics["loss"] == 0.5 / 4
    assert metrics["kl"] == 0.25 / 4
    assert metrics["advantage_abs_mean"] == 3 / 5
    assert (metrics["lost_pairs"], metrics["tied_pairs"], metrics["zero_direction_pairs"]) == (1, 1, 0)
    assert (metrics["trained_items"], metrics["seconds_update"]) == (1, 1.5)


def test_every_optimiser_step_counts_once():
    totals = Totals.zero(torch.device("cpu"))
    kinds = {"applied": StepResult(1.0, applied=True), "skipped": StepResult(1.0, applied=False)}
    kinds["left out"] = StepResult(0.0, applied=False, left_out=True)
    for kind, count in (("applied", 4), ("skipped", 3), ("left out", 2)):
        for _ in range(count):
            totals.count_step(kinds[kind])
    none = torch.zeros(2, dtype=torch.bool)
    metrics = update_metrics(totals, Advantage(torch.zeros(2, 2), none, none, none), 9, 0.0)
    assert (metrics["optimizer_steps"], metrics["skipped_steps"], metrics["left_out_steps"]) == (4, 3, 2)
    assert metrics["grad_norm"] == 1.0


def test_of_a_pair_the_size_of_its_advantage_counts_and_not_its_sign():
    flags = [
        torch.tensor(rows, dtype=torch.bool) for rows in ([1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1])
    ]
    values = torch.tensor([[-3.0, 3.0], [0.0, 0.0], [0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [2.0, -2.0]])
    metrics = update_metrics(counted(), Advantage(values, *flags), 1, 0.0)
    assert (metrics["lost_pairs"], metrics["tied_pairs"], metrics["zero_direction_pairs"]) == (2, 1, 3)
    assert metrics["advantage_abs_mean"] == 1.0


def test_the_floor_is_logged_as_measured_and_as_zero_where_nothing_was():
    none = torch.zeros(1, dtype=torch.bool)
    adv = Advantage(torch.zeros(1, 2), none, none, none)
    measured = update_metrics(counted([0.25, -0.75]), adv, 1, 0.0)
    assert measured["log_ratio_floor"] == 0.5
    assert (measured["log_ratio_mean"], measured["log_ratio_largest"]) == (-0.25, 0.75)
    assert update_metrics(counted(), adv, 1, 0.0)["log_ratio_floor"] == 0.0
