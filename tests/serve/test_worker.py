"""The engine's side of a served run, on a queue that remembers when it was told."""

from types import SimpleNamespace

import pytest

from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.serve.worker import Worker


@pytest.mark.parametrize("error", [None, UsageError("no")])
def test_who_hears_that_an_operation_is_over_finds_the_run_where_it_led(error):
    status, seen = {"epoch": 4}, []
    queue = SimpleNamespace(finish=lambda number, result, problem: seen.append((dict(status), result, problem)))
    backend = SimpleNamespace(queue=queue, status=status, bell=SimpleNamespace(ring=lambda: seen.append("rung")))
    engine = SimpleNamespace(epoch=5, next_pair=16, weights_version=10)
    worker = SimpleNamespace(_backend=backend, _engine=engine, _training=None, _settle=lambda *_: None)
    worker._report = lambda: Worker._report(worker)
    result = None if error else {"epoch": 5}
    Worker._finish(worker, 7, "train", result, error)
    (told, told_result, problem), rung = seen
    assert (told["epoch"], told_result, rung) == (5, result, "rung")
    assert (problem is None) == (error is None)
