"""Equal warnings are written once, with how many followed."""

import io
import os
import sys
import threading

import pytest

from fdfo_engine.runtime.console import equal_warnings_counted, say, warn, warnings_heard
from fdfo_engine.runtime.errors import RewardError, error_message, report_and_exit_code


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


def test_a_terminal_without_a_character_shows_its_escape(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", terminal)
    say("reward 0.5 ±0.1 é😀")
    assert terminal.buffer.getvalue() == b"reward 0.5 \\xb10.1 \\xe9\\U0001f600\n"


@pytest.mark.parametrize("kind", ["full", "closed", "gone"])
def test_what_cannot_be_printed_ends_nothing(kind, monkeypatch, tmp_path):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    def full():
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")

    streams = {"full": full, "closed": io.StringIO, "gone": Gone}
    stream = streams[kind]()
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    say("a line")
    warn("another")
    if kind == "full":
        with pytest.raises(OSError, match="No space"):
            stream.close()  # a command that is done learns of it


def test_no_control_character_reaches_the_terminal(capsys):
    say("reward \x1b]0;title\x07 \x1b[31mred\r\u202egnp\n\tsecond line \u00a0 👩\u200d🔬 é")
    assert capsys.readouterr().out == (
        "reward \\x1b]0;title\\x07 \\x1b[31mred\\r\\u202egnp\n\tsecond line \u00a0 👩\u200d🔬 é\n"
    )


def test_a_key_of_the_environment_is_shown_nowhere(capsys, monkeypatch):
    monkeypatch.setenv("FDFO_REWARD_KEY", "topsecretword")
    monkeypatch.setenv("HF_TOKEN", "hf_another1")
    monkeypatch.setenv("PLAIN", "an ordinary word")
    heard = []
    with warnings_heard(heard.append):
        warn("the server said: Bearer topsecretword, hf_another1, an ordinary word")
    say("topsecretword")
    told = capsys.readouterr()
    assert told.err == "warning: the server said: Bearer ***, ***, an ordinary word\n"
    assert told.out == "***\n"
    assert heard == ["the server said: Bearer ***, ***, an ordinary word"]
    error = RewardError("HTTP 401: Bearer topsecretword")
    assert error_message(error) == "HTTP 401: Bearer ***"
    assert report_and_exit_code(error) == 5
    assert "topsecretword" not in capsys.readouterr().err
