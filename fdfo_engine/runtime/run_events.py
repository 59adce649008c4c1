"""The events of a run, and who hears them: files, the status, the terminal, the caller, a webhook."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from fdfo_engine.config import Config
from fdfo_engine.runtime import events
from fdfo_engine.runtime.console import say, warn, warnings_heard
from fdfo_engine.runtime.distributed import on_main
from fdfo_engine.runtime.errors import (
    CheckpointError,
    DistributedError,
    GuardStop,
    Stopped,
    error_message,
    exit_code,
)
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.posting import KubeflowStatus, Webhook, is_kubeflow
from fdfo_engine.runtime.run_folder import RunFolder
from fdfo_engine.runtime.run_log import RunLog
from fdfo_engine.runtime.run_pictures import RunPictures
from fdfo_engine.runtime.stop import StopRequest
from fdfo_engine.runtime.survivor import speak_for_rank_0
from fdfo_engine.runtime.terminal import Terminal, duration
from fdfo_engine.runtime.ticker import Ticker


class Told(Protocol):
    """Where a run's events go."""

    def tell(self, data: events.AnyData) -> None:
        """Tells an event, on rank 0; collective."""


class RunEvents:
    """Tells the events of one run; a context manager, which on exit tells how it ended.

    Rank 0 has the folder and the listeners. Files of the run are written from `open` on, since before it nobody knows
    where they continue; what was told earlier is written then.
    """

    def __init__(
        self, config: Config, folder: RunFolder | None, stop: StopRequest, on_event: events.Listener | None
    ) -> None:
        self._config, self._folder, self._stop = config, folder, stop
        self._terminal = Terminal(config.run.epochs)
        self._live = events.EventStream([self._terminal, *([] if on_event is None else [on_event])])
        self._kept: events.EventStream | None = None
        self._early: list[events.AnyData] = []
        self._log: RunLog | None = None
        self._posts: list[events.Listener] = []
        self._epoch = 0
        self._phase: events.Phase | None = None
        self._has_said = self._has_said_urgent = False
        self._lock = threading.RLock()
        self._around = ExitStack()

    def __enter__(self) -> RunEvents:
        if self._folder is not None:
            self._live.listeners.insert(0, self._folder.status)
            self._around.enter_context(
                Ticker(self._folder.status.beat, self._terminal.tick, self._say_what_a_stop_does)
            )
            self._around.enter_context(warnings_heard(self._caution))
            self._posts = self._opened_posts()
            self._tell(events.State(epoch=0, state="starting", epochs=self._config.run.epochs))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            try:
                self._tell_the_end(error)
            except CheckpointError as refused:
                warn(f"the end of the run is not in its files: {refused}")
            self._around.close()
            self._terminal.close()
        elif isinstance(error, DistributedError):
            self.tell_end(error)

    def tell_end(self, error: DistributedError) -> None:
        """As on exit, from the watchdog's thread; where rank 0, which else tells it, is gone, on any rank."""
        if self._folder is not None:
            self._tell_the_end(error)
        else:
            speak_for_rank_0(Path(self._config.run.dir), error)

    def _opened_posts(self) -> list[events.Listener]:
        posts: list[Webhook | KubeflowStatus] = []
        posts += [Webhook(self._config.log.webhook)] if self._config.log.webhook else []
        posts += [KubeflowStatus(self._config.run.epochs)] if is_kubeflow() else []
        for post in posts:
            self._around.callback(post.close)
        return list(posts)

    def open(self, epoch: int, room: int) -> None:
        """Cuts the logs back to `epoch` (-1: a fresh run) and writes on from there if `room` bytes are left. On rank 0.

        Raises:
            CheckpointError: the storage refuses.
            EnvironmentProblem: a wanted tracker is not installed.
        """
        assert self._folder is not None
        self._epoch, config = max(epoch, 0), self._config
        self._folder.truncate_logs(epoch)
        self._folder.require_room(room)
        self._log = RunLog(
            self._folder.path, first_epoch=self._epoch, tensorboard=config.log.tensorboard, wandb=config.log.wandb,
            settings=config.model_dump(),
        )  # fmt: skip
        self._write(self._log)

    def tell(self, data: events.AnyData) -> None:
        """Tells an event, on rank 0; collective, so that all ranks learn of a listener's error."""
        on_main(lambda: self._tell(data))

    def relay(self, event: events.Event) -> None:
        """Tells what the engine told. On rank 0."""
        self._tell(event.data)

    def _tell(self, data: events.AnyData) -> None:
        with self._lock:  # a reward's thread warns while the main one goes on
            if isinstance(data, events.Phase):
                self._phase = data
            elif isinstance(data, events.Metrics):
                self._epoch = data.epoch
            if self._kept is None:
                self._early.append(data)
            else:
                self._kept.tell(data)
            self._live.tell(data)

    def _write(self, *listeners: events.Listener) -> None:
        assert self._folder is not None
        log = EventLog(self._folder.path)
        self._around.callback(log.close)
        files: list[events.Listener] = [RunPictures(self._folder.path), log, *listeners]
        with self._lock:
            self._kept = events.EventStream([*files, *self._posts], last_seq=log.last_seq)
            for data in self._early:
                self._kept.tell(data)

    def _caution(self, message: str) -> None:
        self._tell(events.Caution(epoch=self._epoch, message=message))

    def _tell_the_end(self, error: BaseException | None) -> None:
        if self._kept is None:
            self._write()
        code = 0 if error is None else exit_code(error)
        message = "" if error is None else error_message(error)
        state: Literal["finished", "failed", "stopped"] = "finished"
        if error is not None:
            state = "stopped" if isinstance(error, Stopped | GuardStop) else "failed"
        if state == "failed":
            self._tell(events.Failure(epoch=self._epoch, message=message, exit_code=code))
        self._tell(events.State(epoch=self._epoch, state=state, epochs=self._config.run.epochs, message=message))
        self._tell(events.Done(epoch=self._epoch, state=state, exit_code=code))
        if error is None and self._log is not None:
            self._log.close()  # else trackers learn from the process's exit status how it ended

    def _say_what_a_stop_does(self) -> None:
        """From the ticker's thread, since the main one may be within a long operation."""
        if not self._stop.poll():
            return
        if self._stop.is_urgent and not self._has_said_urgent:
            say("leaving now; the same command goes on from the last checkpoint")
        elif not self._has_said:
            say(f"{self._stop.reason}: {_what_a_stop_does(self._phase, self._stop)}")
        self._has_said, self._has_said_urgent = True, self._stop.is_urgent


def _what_a_stop_does(phase: events.Phase | None, stop: StopRequest) -> str:
    again = "Ctrl-C again to leave now"
    if phase is None or phase.name == "loading":
        return f"stopping as soon as the model is loaded; {again}"
    if phase.name == "update" and not stop.lets_finish(phase.eta_s):
        return f"leaving epoch {phase.epoch} unfinished, since it would take too long; the epochs before it are saved"
    if phase.name == "update":
        left = "" if phase.eta_s is None else f" ({duration(phase.eta_s)} left)"
        return f"finishing epoch {phase.epoch}{left}, then saving; {again}"
    return f"stopping, then saving the last whole epoch; {again}"
