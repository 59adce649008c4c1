"""The harness that kills training runs: what it counts as a failure, and that it finds out what is planted."""

import copy
import random

import pytest

from benchmarks.nursery import Nursery
from benchmarks.reliability import failures, summary
from benchmarks.soak import Look, growth, soak
from benchmarks.training_kills import differences, killed_once, lost, planted_failures, training_kills
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.events import Checkpoint, EventStream

ROW = {
    "fault": "stopped", "phase": "update", "rank": 1, "seconds_to_the_end": 8.0, "exit_code_of_the_other": 8,
    "named_with_phase": True, "exit_code_told": 8, "resumable": True,
}  # fmt: skip
SOUND = {
    "saves": {
        "store": {"kills": 60, "unloadable": 0, "torn": 0, "lost": 0},
        "planted_writer_in_place": {"kills": 20, "unloadable": 6, "torn": 1, "lost": 0},
    },
    "faults": {"faults": [ROW], "planted_without_watchdog": ROW | {"exit_code_of_the_other": None}},
    "kills_of_one_rank": {"kills": 8, "kills_during_saves": 4, "failures": [], "planted": {"found": ["gone"]}},
    "save_cost": {"share_of_an_epoch": 0.01},
    "soak": {"epochs": 300, "failures": [], "planted_leaks": {"failures": ["files", "threads", "memory"]}},
}
SPOILED = {
    "a lost save": ("saves", "store", "lost", 1),
    "a blind harness of saves": ("saves", "planted_writer_in_place", "unloadable", 0),
    "a blind harness of runs": ("kills_of_one_rank", "planted", "found", []),
    "other bits": ("kills_of_one_rank", "failures", ["epoch_000002/weights.safetensors has other bits"]),
    "a rank that is not named": ("faults", "faults", [ROW | {"named_with_phase": False}]),
    "another exit code": ("faults", "faults", [ROW | {"exit_code_told": 1}]),
    "nothing to go on from": ("faults", "faults", [ROW | {"resumable": False}]),
    "a run that grows": ("soak", "failures", ["memory: 600 MB before, 900 MB after"]),
    "a blind harness of growth": ("soak", "planted_leaks", {"failures": ["files", "threads"]}),
    "a blind harness of faults": ("faults", "planted_without_watchdog", ROW),
}


def test_a_sound_run_has_no_failures():
    assert failures(SOUND) == []
    assert summary(SOUND)["kills"] == 68
    assert summary({}) | {"failures": []} == summary({})


@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_hold_is_a_failure(name):
    parts = copy.deepcopy(SOUND)
    *path, last, value = SPOILED[name]
    place = parts
    for key in path:
        place = place[key]
    place[last] = value
    if name == "a blind harness of saves":
        place["torn"] = 0
    assert len(failures(parts)) == 1


def test_a_checkpoint_that_was_told_of_and_is_gone_is_lost(tmp_path):
    assert lost(tmp_path) == []
    EventStream([EventLog(tmp_path)]).tell(Checkpoint(epoch=3, name="epoch_000003"))
    assert lost(tmp_path) == ["epoch_000003 was told of, and nothing is there"]


def test_other_bits_and_other_logs_are_told(tmp_path):
    for name, data in (("one", b"a"), ("two", b"b")):
        folder = tmp_path / name / "run/checkpoints/epoch_000001"
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(data)
        (tmp_path / name / "run/metrics.jsonl").write_text(f'{{"epoch": 1, "reward_mean": {len(name)}.0}}\n')
    assert differences(tmp_path / "one", tmp_path / "two") == ["epoch_000001/weights.safetensors has other bits"]
    (tmp_path / "two/run/metrics.jsonl").write_text("")
    assert differences(tmp_path / "one", tmp_path / "two")[0] == "the logs of epochs differ"
    assert "other checkpoints" in differences(tmp_path / "one", tmp_path / "nowhere")[-1]


def look(epoch, **changes):
    flat = Look(epoch, memory_mb=600.0, files=19, threads=12, disk_bytes=9000, checkpoints=3, log_bytes=100 * epoch)
    return flat._replace(**changes)


def test_what_grows_is_told():
    early, late = [look(10), look(20)], [look(30), look(40)]
    assert growth(early, late) == []
    for changes in (
        {"memory_mb": 620.0}, {"files": 20}, {"threads": 13}, {"disk_bytes": 10_000}, {"checkpoints": 5},
        {"log_bytes": 5000},
    ):  # fmt: skip
        assert len(growth(early, [look(30), look(40, **changes)])) == 1, changes


@pytest.mark.slow
def test_a_run_of_many_epochs_stays_flat_and_a_leak_is_found_out(tmp_path):
    """`python -m benchmarks.reliability` is the long form."""
    with Nursery() as nursery:
        assert soak(nursery, tmp_path / "flat", 60)["failures"] == []
        assert len(soak(nursery, tmp_path / "leaks", 16, leaks=True)["failures"]) >= 3


@pytest.mark.slow
def test_kills_of_training_lose_nothing_and_a_run_that_tells_too_early_is_found_out(tmp_path):
    """`python -m benchmarks.reliability` is the long form."""
    with Nursery() as nursery:
        assert training_kills(nursery, tmp_path, ranks=1, kills=2, seed=3)["failures"] == []
        assert planted_failures(nursery, tmp_path, most=8)["found"]
        assert killed_once(nursery, tmp_path / "save", 1, random.Random(0), [], during_save=True)
