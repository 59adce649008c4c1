"""SIGKILL of a served run: what was acknowledged is there once, and events go on where they were."""

import argparse

import pytest

from benchmarks import serve_kills


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_lose_nothing_and_double_nothing(tmp_path, ranks):
    """`python -m benchmarks.serve_kills --kills 200` is the long form."""
    arguments = argparse.Namespace(kills=6, ranks=ranks, seed=1, mean_s=6.0)
    killed = serve_kills.killed_run(tmp_path / "killed", arguments)
    whole = serve_kills.whole_run(tmp_path / "whole", arguments, killed["epochs"])
    assert killed["requests"] > 5
    assert serve_kills.failures(tmp_path, killed, whole) == []
