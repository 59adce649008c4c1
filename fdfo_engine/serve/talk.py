"""What a served run tells: the same events, files and status as a run of its own, and a bell for who waits."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from fdfo_engine.config import Config
from fdfo_engine.runtime import events
from fdfo_engine.runtime.distributed import on_main
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME, RunFolder, truncate_log
from fdfo_engine.runtime.run_log import RunLog
from fdfo_engine.runtime.run_pictures import RunPictures
from fdfo_engine.runtime.ticker import Ticker
from fdfo_engine.serve.backend import Bell


class Talk:
    """Hands on events; on other ranks than 0 nothing. A context manager.

    Events are never cut back: a client that has seen a number must not meet it again. What is repeated after a kill is
    told to the logs of numbers alone, which do end where the checkpoint does.

    Attributes:
        stream: for what is told from the HTTP threads. phase: the last one, unless it has ended.
        is_repeating: whether what the engine tells was told before.
    """

    def __init__(self, config: Config, folder: RunFolder | None, bell: Bell) -> None:
        self._config, self._folder, self._bell = config, folder, bell
        self.is_repeating = False
        self.phase: events.Phase | None = None
        self._around = ExitStack()
        self._numbers: RunLog | None = None
        self.stream = events.EventStream()
        if folder is not None:
            log = EventLog(folder.path)
            self._around.callback(log.close)
            self.stream = events.EventStream(
                [folder.status, RunPictures(folder.path), log, self._hear], last_seq=log.last_seq
            )  # fmt: skip

    def __enter__(self) -> Talk:
        if self._folder is not None:
            self._around.enter_context(Ticker(self._folder.status.beat))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._numbers is not None:
            self._numbers.close()
        self._around.close()

    def open_logs(self, epoch: int) -> None:
        """Cuts the logs of numbers back to `epoch`, where the checkpoint is. Collective."""
        on_main(lambda: self._open_logs(epoch))

    def _open_logs(self, epoch: int) -> None:
        assert self._folder is not None
        folder, settings = self._folder.path, self._config
        for name in (METRICS_NAME, EVALUATIONS_NAME):
            truncate_log(folder / name, epoch)
        if self._numbers is None:
            self._numbers = RunLog(
                folder, first_epoch=epoch, tensorboard=settings.log.tensorboard, wandb=settings.log.wandb,
                settings=settings.model_dump(),
            )  # fmt: skip

    def tell(self, data: events.AnyData) -> None:
        """Tells an event, on rank 0; collective."""
        on_main(lambda: self._tell(data))

    def relay(self, event: events.Event) -> None:
        """Tells what the engine told. On rank 0."""
        self._tell(event.data)

    def _tell(self, data: events.AnyData) -> None:
        if self.is_repeating:
            if self._numbers is not None:
                events.EventStream([self._numbers]).tell(data)
            return
        self.stream.tell(data)

    def _hear(self, event: events.Event) -> None:
        if self._numbers is not None:
            self._numbers(event)
        if isinstance(event.data, events.Phase):
            self.phase = None if event.data.done == event.data.total else event.data
        self._bell.ring()
