"""What a person sees while something takes long."""

import io

import pytest

from fdfo_engine import train
from fdfo_engine.runtime import events, terminal
from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.runtime.terminal import Terminal, importing, phase_line, shown


class Screen(io.StringIO):
    def isatty(self):
        return True

    def text(self):
        """What was written since the last time."""
        written = self.getvalue()
        self.seek(0)
        self.truncate()
        return written


def opened(monkeypatch):
    """Standard error as a terminal."""
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(terminal, "_MOST_OFTEN_S", -1.0)
    return screen


def phase(done, total=8, name="rollout", **more):
    return events.Phase(epoch=1, name=name, done=done, total=total, **more)


def test_a_bar_shows_at_once_moves_and_goes(monkeypatch):
    screen = opened(monkeypatch)
    stream = EventStream([Terminal()])
    stream.tell(phase(0))
    assert "rollout        0%" in screen.text()
    stream.tell(phase(4))
    shown_now = screen.text()
    assert " 50%" in shown_now
    assert "4/8 images" in shown_now
    assert "left" in shown_now
    stream.tell(phase(8))
    assert screen.text().endswith("\r")


def test_lines_are_not_written_into_a_bar(monkeypatch):
    screen = opened(monkeypatch)
    bar = Terminal()
    EventStream([bar]).tell(phase(4))
    screen.text()
    warn("careful")
    told = screen.text()
    assert "\nwarning" not in told
    cleared, after = told.split("warning: careful\n")
    assert cleared.endswith("\r")
    assert "50%" in after
    bar.close()


def test_what_has_no_total_shows_its_time(monkeypatch):
    screen = opened(monkeypatch)
    with shown() as bar, bar.working("counting"):
        assert screen.text().strip().startswith("counting, 00:00")


def test_imports_that_take_seconds_show_their_time(monkeypatch, tmp_path):
    screen = opened(monkeypatch)
    (tmp_path / "slow_to_import.py").write_text("import sys\nseen = sys.stderr.text()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with importing():
        import slow_to_import
    assert slow_to_import.seen.strip().startswith("loading, 00:00")
    assert screen.text().endswith("\r")


def test_a_run_shows_that_it_imports(monkeypatch, tmp_path):
    screen, ran = opened(monkeypatch), []
    monkeypatch.setattr("fdfo_engine.loop.run", lambda config, **_: ran.append(screen.text()))
    assert train.main(["--config", "shapes", f"run.dir={tmp_path}/run"]) == 0
    assert "loading, 00:00" in ran[0]


def test_a_bar_is_redrawn_while_nothing_happens(monkeypatch):
    screen = opened(monkeypatch)
    monkeypatch.setattr(terminal, "_REDRAW_S", -1.0)
    bar = Terminal()
    EventStream([bar]).tell(phase(4))
    screen.text()
    bar.tick()
    assert "50%" in screen.text()
    bar.close()
    bar.tick()
    assert "50%" not in screen.text()


def test_one_phase_takes_the_place_of_another(monkeypatch):
    screen = opened(monkeypatch)
    stream = EventStream([Terminal()])
    update = {"name": "update", "unit": "micro-batches"}
    for data in (phase(4), phase(0, **update), phase(2, **update)):
        screen.text()
        stream.tell(data)
    assert "2/8 micro-batches" in screen.text()


def test_without_a_terminal_lines_come_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "PLAIN_S", -1.0)
    plain = Terminal()
    stream = EventStream([plain])
    stream.tell(phase(4, per_second=2.0, eta_s=2.0))
    assert capsys.readouterr() == ("", "")
    plain.tick()
    assert capsys.readouterr().out == "rollout 4/8 images, 2 a second, left 2s\n"
    stream.tell(phase(8))
    plain.tick()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (phase(0), "rollout 0/8 images"),
        (phase(0, total=None, name="update"), "update: still at it"),
        (phase(3, total=None, unit="blocks"), "rollout: 3 blocks"),
        (phase(0, total=1, name="loading"), "loading: still at it"),
        (phase(4, per_second=0.01234, eta_s=324.1), "rollout 4/8 images, 0.0123 a second, left 5m 24s"),
    ],
)
def test_how_far_a_phase_is_in_words(data, line):
    assert phase_line(data) == line


def test_a_line_of_output_is_whole_without_bars(capsys):
    say("all")
    assert capsys.readouterr().out == "all\n"
