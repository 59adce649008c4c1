"""What a person sees of an engine at work: a bar, or now and then a line, and a line for each result."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fdfo_engine.runtime import events
from fdfo_engine.runtime.console import is_printing_rank, say, visible
from fdfo_engine.runtime.ticker import Ticker

PLAIN_S = 30.0
"""How often a line tells how far it is, where there is no terminal to draw a bar in."""

_REDRAW_S = 1.0
_MOST_OFTEN_S = 0.1
_SMOOTHING_EPOCHS = 5
_BAR = "{desc:<12} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} {unit}, {elapsed}, left {remaining}"
_NO_TOTAL = "{desc}, {elapsed}"


class Terminal:
    """A listener of events; rank 0 shows them, others nothing. `tick` from another thread keeps what it shows fresh."""

    def __init__(self, epochs: int = 0) -> None:
        """`epochs` of the whole run, for the line of each."""
        self._lines = _EpochLines(epochs)
        self._lock = threading.RLock()
        self._draws = sys.stderr.isatty()
        self._phase: events.Phase | None = None
        self._bar: Any = None
        self._shown_s = self._drawn_s = time.monotonic()

    def __call__(self, event: events.Event) -> None:
        """Shows the event, if a person wants to see it."""
        if not is_printing_rank():
            return
        with self._lock:
            match event.data:
                case events.Phase() as phase:
                    self._show(phase)
                case events.Metrics(kind="epoch", values=record):
                    self._end_bar()
                    say(self._lines.line(record))
                case events.Metrics(kind="evaluation", values=record):
                    self._end_bar()
                    say(_evaluation_line(record))
                case events.State() | events.Done():
                    self._end_bar()

    def tick(self) -> None:
        """Redraws the bar each second; without one says each half minute how far the phase is."""
        with self._lock:
            wait_s = _REDRAW_S if self._draws else PLAIN_S
            if self._phase is None or time.monotonic() - self._shown_s < wait_s or not is_printing_rank():
                return
            self._shown_s = time.monotonic()
            if self._bar is not None:
                self._bar.refresh()
            elif not self._draws:
                say(phase_line(self._phase))

    @contextmanager
    def working(self, name: events.PhaseName) -> Iterator[None]:
        """Shows that something is being done of which nobody knows how far it is."""
        stream = events.EventStream([self])
        stream.tell(events.Phase(epoch=0, name=name, done=0, total=1))
        yield
        stream.tell(events.Phase(epoch=0, name=name, done=1, total=1))

    def close(self) -> None:
        """Leaves no bar behind."""
        with self._lock:
            self._end_bar()

    def _show(self, phase: events.Phase) -> None:
        if self._phase is None or phase.name != self._phase.name or phase.done < self._phase.done:
            self._end_bar()
            self._bar = _bar(phase) if self._draws else None
            self._shown_s = time.monotonic()
        self._phase = phase
        if self._bar is not None:
            self._bar.total = phase.total
            self._bar.n = phase.done
            if time.monotonic() - self._drawn_s > _MOST_OFTEN_S:
                self._drawn_s = time.monotonic()
                self._bar.refresh()
        if phase.done == phase.total:
            self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._phase = None


@contextmanager
def shown() -> Iterator[Terminal]:
    """A terminal that keeps itself fresh, for a command."""
    terminal = Terminal()
    with Ticker(terminal.tick):
        try:
            yield terminal
        finally:
            terminal.close()


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds, of which a person sees that something goes on."""
    with shown() as terminal, terminal.working("loading"):
        yield


def _bar(phase: events.Phase) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread of tqdm's beside ours

    layout = _BAR if phase.total is not None and phase.total > 1 else _NO_TOTAL
    return Bar(
        total=phase.total, desc=phase.name, unit=phase.unit, bar_format=layout, leave=False, file=sys.stderr,
        dynamic_ncols=True, mininterval=0.0,
    )  # fmt: skip


def phase_line(phase: events.Phase) -> str:
    """How far a phase is, in words."""
    if phase.total is None or phase.total == 1:
        return f"{phase.name}: {phase.done} {phase.unit}" if phase.done else f"{phase.name}: still at it"
    parts = [f"{phase.name} {phase.done}/{phase.total} {phase.unit}"]
    if phase.per_second is not None and phase.eta_s is not None:
        parts += [f"{phase.per_second:.3g} a second", f"left {duration(phase.eta_s)}"]
    return ", ".join(parts)


def _evaluation_line(record: Mapping[str, Any]) -> str:
    errors = record.get("metrics_stderr") or {}
    shown = "  ".join(f"{name} {mean:.4f}{_plus_minus(errors.get(name))}" for name, mean in record["metrics"].items())
    return f"evaluation after epoch {record['epoch']} ({record['count']} images, {record['weights']}): {shown}"


class _EpochLines:
    """Makes one aligned line of an epoch's metrics."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._recent: deque[float] = deque(maxlen=_SMOOTHING_EPOCHS)
        self._last_reward: float | None = None

    def line(self, record: Mapping[str, Any]) -> str:
        epoch, width = int(record["epoch"]), len(str(self._epochs))
        seconds = [(name, float(record.get(f"seconds_{name}") or 0)) for name in ("rollout", "reward", "update")]
        parts = [
            f"epoch {epoch:>{width}}/{self._epochs}",
            self._reward(record),
            f"{_number(record, 'images_per_second'):7.2f} img/s",
            " ".join(f"{name} {value:.1f}s" for name, value in seconds),
            f"skipped {record.get('skipped_steps', 0)} tied {record.get('tied_pairs', 0)}",
            self._time_left(record, epoch),
        ]
        return "  ".join(parts)

    def _reward(self, record: Mapping[str, Any]) -> str:
        mean = _number(record, "reward_mean")
        delta = mean - self._last_reward if self._last_reward is not None else 0.0
        self._last_reward = mean
        return f"reward {mean:8.4f} ±{_number(record, 'reward_std'):.4f} ({delta:+.4f}){_parts(record)}"

    def _time_left(self, record: Mapping[str, Any], epoch: int) -> str:
        self._recent.append(_number(record, "seconds_total"))
        return f"left {duration(sum(self._recent) / len(self._recent) * max(0, self._epochs - epoch))}"


def _parts(record: Mapping[str, Any]) -> str:
    """The mean of each reward, where there are several: the sum alone says little of scores that were normalised."""
    keys = [key for key in record if key.startswith("reward_") and key.endswith("_mean") and key != "reward_mean"]
    if len(keys) < 2:
        return ""
    names = [visible(key.removeprefix("reward_").removesuffix("_mean")) for key in keys]
    means = [f"{name} {_number(record, key):.4g}" for name, key in zip(names, keys, strict=True)]
    return f" [{', '.join(means)}]"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `48s`, `12m 05s`, `3h 20m`, `2d 4h`; `?` for a number that is not finite."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float("nan") if value is None else float(value)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ±{error:.4f}"
