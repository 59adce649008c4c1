"""Figures that the code has beside its settings, written down once more: none of them changes in passing."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fdfo_engine"
FIGURES = {
    "update.deepspeed_settings": {"BUCKET_VALUES": 500_000_000, "MAX_LIVE_VALUES": 1_000_000_000},
    "update.half_precision": {"LARGEST": 64.0},
    "update.updater": {"MAX_SKIPPED_IN_A_ROW": 10},
    "rollout.churn": {"MIN_DENSITY": 1e-6},
    "rollout.prompts": {"MAX_PROMPT_BYTES": 16_384},
    "rollout.sampler": {"DECODE_IMAGES": 4},
    "algorithms.ablation": {"OWN_NOISE": 1e6},
    "algorithms.groups": {"LEAST_SPREAD": 1e-4},
    "runtime.checkpoint": {"SCHEMA_VERSION": 1, "SHARD_BYTES": 5_000_000_000},
    "runtime.content_hash": {"REMEMBERED_FROM_BYTES": 1_048_576, "_SETTLED_AFTER_NS": 2_000_000_000},
    "runtime.distributed": {"MAX_DIFF_BYTES": 1_048_576, "MAX_DIFF_LINES": 8},
    "runtime.peers": {"CARD_BYTES": 256},
    "runtime.posting": {"PHASES_EVERY_S": 10.0, "KUBEFLOW_EVERY_S": 5.0},
    "runtime.run_pictures": {"MAX_EVALUATION_IMAGES": 24},
    "runtime.run_status": {"HEARTBEAT_S": 3.0},
    "runtime.run_lock": {"SILENCE_S": 15.0},
    "runtime.stop": {"AGAIN_S": 1.0, "GRACE_S": 20.0},
    "runtime.terminal": {"PLAIN_S": 30.0},
    "runtime.ticker": {"EVERY_S": 0.25},
    "runtime.watch": {"COLLECTIVE_TIMEOUTS": 6, "LEAVE_S": 10.0},
    "runtime.interleaved": {"HEAD_START_CYCLES": 2_000_000, "MIN_ROUNDS": 11},
    "rewards.background": {"MAX_BLOCKS_WAITING": 4, "LAST_WAIT_S": 5.0},
    "rewards.first_token": {"_MOST_ABOVE_ZERO": 0.01, "_MOST_IN_ALL": 1.5, "_FLOOR_MASS": 1e-3},
    "rewards.geneval": {"MAX_OBJECTS": 16},
    "rewards.geneval_rules": {"_FREE_SHARE": 0.1, "_LEAST_SHARE": 0.5},
    "rewards.http_reward": {"_VERSION": 1},
    "rewards.isolated": {"START_S": 120.0},
    "rewards.json_server": {
        "READY_WITHIN_S": 10.0, "_MAX_REPLY_BYTES": 4_194_304, "_TRIES": 3, "_LONGEST_WAIT_S": 30.0,
        "_PASSING": {408, 425, 429, 502, 503, 504},
    },
    "rewards.model_options": {"LOADING_S": 3600.0},
    "rewards.questions": {"SIDE_STEP": 28},
    "rewards.verification": {"TOLERANCE": 1e-3},
    "config.batch": {"MAX_AUTO_BLOCK": 12},
    "config.load": {"MAX_BYTES": 1_048_576},
    "config.schema": {"AUTO_MICRO_BATCH": 24, "MAX_SEED": 18_446_744_073_709_551_615},
    "evaluation.compare": {"SCHEMA_VERSION": 1, "PREVIEW_SIDE": 256},
    "metrics.diversity": {"_PIXEL_SIDE": 64, "_CELLS": 8, "_ORIENTATIONS": 8},
    "metrics.embeddings": {
        "CLIP_MEAN": (0.48145466, 0.4578275, 0.40821073), "CLIP_STD": (0.26862954, 0.26130258, 0.27577711),
    },
    "metrics.health": {
        "GRID_PERIODS": (8, 16), "EDGE_THRESHOLD": 0.1, "NYQUIST_BAND": 0.45, "_LUMA": (0.299, 0.587, 0.114),
    },
    "training.preflight": {"GB": 1e9, "LEAST_FREE_BYTES": 1e9},
    "training.watch": {"MAX_TIED_EPOCHS": 3, "WINDOW": 10, "LEAST": 4, "LIMIT": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("module", FIGURES)
def test_a_figure_is_what_it_was(module):
    found = importlib.import_module(f"fdfo_engine.{module}")
    assert {name: getattr(found, name) for name in FIGURES[module]} == FIGURES[module]


def numbers_of(file):
    """Public names that a module gives a number, or several, written as such."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and not any(isinstance(part, ast.Name) for part in ast.walk(node.value)):
            parts = [part for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
            if parts and all(type(part.value) in (int, float) for part in parts):
                yield from (
                    part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)
                )


def test_every_public_figure_is_written_here():
    for package in sorted({module.partition(".")[0] for module in FIGURES}):
        for file in sorted((PACKAGE / package).glob("*.py")):
            public = {name for name in numbers_of(file) if not name.startswith("_")}
            assert public <= FIGURES.get(f"{package}.{file.stem}", {}).keys(), file


CHANGES = {
    "Totals", "_Accumulation", "Rollout", "Reading", "WeightedRewards",
}  # fmt: skip
"""Values that are added to, or marked, by those who have them."""


@pytest.mark.parametrize(
    "package", ["update", "algorithms", "rollout", "trajectory", "rewards", "evaluation", "metrics"]
)
def test_what_is_passed_from_part_to_part_is_changed_by_none(package):
    found = {}
    for file in sorted((PACKAGE / package).glob("*.py")):
        module = importlib.import_module(f"fdfo_engine.{package}.{file.stem}")
        own = [value for value in vars(module).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
        found |= {value.__name__: value for value in own if value.__module__ == module.__name__}
    open_ones = {name for name, value in found.items() if not value.__dataclass_params__.frozen}
    assert open_ones == CHANGES & found.keys()
