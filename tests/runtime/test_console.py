"""Equal warnings are written once, with how many followed."""

import threading

import pytest

from fdfo_engine.runtime.console import equal_warnings_counted, warn


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_outside_every_warning_is_written(capsys):
    warn("a")
    warn("a")
    assert lines(capsys) == ["warning: a"] * 2


def test_the_first_at_once_and_the_number_of_others_at_the_end(capsys):
    with equal_warnings_counted():
        for number in range(192):
            warn("no logprobs")
            warn(f"reply {number}", like="reply")
        warn("once")
        assert lines(capsys) == ["warning: no logprobs", "warning: reply 0", "warning: once"]
    assert lines(capsys) == ["warning: 191 more like this: no logprobs", "warning: 191 more like this: reply 0"]
    with equal_warnings_counted():
        warn("once")
    assert lines(capsys) == ["warning: once"]


def test_of_threads_and_of_nested_ones_the_outermost_counts(capsys):
    def work():
        with equal_warnings_counted():
            for _ in range(50):
                warn("away")

    with equal_warnings_counted():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert lines(capsys) == ["warning: away", "warning: 399 more like this: away"]


def test_an_error_does_not_hide_the_number(capsys):
    @equal_warnings_counted()
    def fails():
        warn("a")
        warn("a")
        raise ValueError("work")

    with pytest.raises(ValueError, match="work"):
        fails()
    assert lines(capsys) == ["warning: a", "warning: 1 more like this: a"]


def test_only_rank_0_speaks_unless_it_is_of_one_rank_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    warn("a")
    with equal_warnings_counted():
        warn("b", everywhere=True)
        warn("b", everywhere=True)
    assert lines(capsys) == ["rank 2: warning: b"]
