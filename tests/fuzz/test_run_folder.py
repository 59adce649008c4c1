"""Every file of a run folder, damaged: it is read as it was, left out or refused in words, and never ends in a bug."""

import contextlib
import json
import random
import shutil

import pytest
from fuzz.mutating import mutations_of
from fuzz.run_files import READINGS, filled_run

from fdfo_engine.runtime import run_lock

FEW, MANY = range(2), range(2, 40)
CASES = [(name, number) for name, readings in READINGS.items() for number in range(len(readings))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return filled_run(tmp_path_factory.mktemp("fuzz") / "run")


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_damaged_file_is_read_as_it_was_or_refused(run, tmp_path, monkeypatch, name, number, seeds):
    monkeypatch.setattr(run_lock, "SILENCE_S", 0.01)
    read, may_raise, same_or_refused = READINGS[name][number]
    whole = read(run) if same_or_refused else None
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        copy = shutil.copytree(run, tmp_path / str(seed))
        data = rng.choice(mutations_of(name))((copy / name).read_bytes(), rng)
        (copy / name).write_bytes(data)
        with contextlib.suppress(*may_raise):
            value = read(copy)
            assert not same_or_refused or value == whole, data
        shutil.rmtree(copy)


def test_the_harness_catches_a_naive_reader(run, tmp_path):
    """A record read by `json.loads` alone: some damage is a traceback, some another value."""
    text = (run / "base.json").read_bytes()
    whole, outcomes = json.loads(text), set()
    for seed in range(100):
        rng = random.Random(seed)
        data = rng.choice(mutations_of("base.json"))(text, rng)
        try:
            outcomes.add("same" if json.loads(data) == whole else "another value")
        except (ValueError, RecursionError) as error:
            outcomes.add(type(error).__name__)
    assert outcomes >= {"another value", "JSONDecodeError", "UnicodeDecodeError", "RecursionError"}
