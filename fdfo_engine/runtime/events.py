"""What an engine, a run and a server tell while they work: numbered, typed events. Imports no torch.

An event is one JSON object, `{v, seq, time, type, data}`, and one line of a run's `events.jsonl`. `fdfo schema events`
prints the schema of all of them.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, TypeAdapter, create_model

from fdfo_engine.runtime.durable import plain_json

EventType = Literal[
    "state", "phase", "pair", "feedback", "metrics", "images", "checkpoint", "warning", "error", "done"
]  # fmt: skip
RunState = Literal["starting", "running", "paused", "finished", "failed", "stopped"]
PhaseName = Literal[
    "loading", "prompts", "rollout", "reward", "update", "evaluation", "scoring", "generation", "export", "counting",
    "pretraining",
]  # fmt: skip
Pixels: TypeAlias = Any
"""A torch tensor; its type is not named, since a frontend reads events without torch."""


class EventData(BaseModel):
    """What the data of all types have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    type: ClassVar[EventType]

    epoch: int = Field(ge=0)
    """The epoch that it belongs to: 3 is the third one, while it is worked on and when it is finished; 0 is before."""


class State(EventData):
    """The run, or the server, is in another state."""

    type = "state"
    state: RunState
    """paused and what follows it come from a server; a run goes from starting through running to one of the last."""
    epochs: int | None = None
    """Epochs of the whole run."""
    message: str = ""
    """For a person: why it failed or stopped, or what it resumes."""


class Phase(EventData):
    """How far something is that takes a while."""

    type = "phase"
    name: PhaseName
    done: int = Field(ge=0)
    """Units done; 0 is told when the phase begins, `total` when it ends."""
    total: int | None = None
    """Units in all; null until that is known."""
    unit: str = "images"
    """What is counted, in the plural."""
    eta_s: float | None = None
    """Seconds left of this phase at the speed so far; null before anything is done."""
    per_second: float | None = None
    """Units a second since it began; null before anything is done."""


class Pair(EventData):
    """A pair was sampled."""

    type = "pair"
    pair: int = Field(ge=0)
    """Its global index, which never restarts within a run."""
    prompt: str
    round: str | None = None
    """Of a server: the round it was sampled for."""
    images: tuple[str, str] | None = None
    """Of a server: ids of its two images, in no particular order."""


class Feedback(EventData):
    """Somebody's opinion on a pair was recorded."""

    type = "feedback"
    pair: int = Field(ge=0)
    rater: str
    rewards: tuple[float, float] | None = None
    """Of both branches; null is no opinion."""
    round: str | None = None


class Metrics(EventData):
    """Numbers."""

    type = "metrics"
    kind: Literal["update", "epoch", "evaluation"]
    """What `Engine.update` returned, or a line of metrics.jsonl or of evaluations.jsonl."""
    values: dict[str, Any]


class Images(EventData):
    """Pictures were made; the files are there when the event is in events.jsonl."""

    type = "images"
    name: str
    files: tuple[str, ...]
    """Relative to the run folder."""
    captions: tuple[str, ...] = ()
    """One an image: its prompt, in a grid with its score behind."""
    columns: int | None = None
    """Images a row, where all are in one file; null: each has its own."""
    scores: dict[str, tuple[float | None, ...]] = Field(default={})
    """By metric, one value an image."""
    pixels: Pixels = Field(default=None, exclude=True, repr=False)
    """Float `[N, 3, height, width]` in 0..1 for whoever listens in the same process; never written."""


class Checkpoint(EventData):
    """A checkpoint is whole on disk."""

    type = "checkpoint"
    name: str
    """Its folder under `checkpoints/` of the run folder."""


class Caution(EventData):
    """Something a person should know; work goes on."""

    type = "warning"
    message: str


class Failure(EventData):
    """Work ended by an error."""

    type = "error"
    message: str
    exit_code: int
    """As of `runtime/errors.py`."""


class Done(EventData):
    """The run has ended; nothing follows unless it is resumed."""

    type = "done"
    state: Literal["finished", "failed", "stopped"]
    exit_code: int


AnyData: TypeAlias = State | Phase | Pair | Feedback | Metrics | Images | Checkpoint | Caution | Failure | Done
_DATA: tuple[type[EventData], ...] = get_args(AnyData)


class Event(BaseModel):
    """One event, as a listener gets it and as one line of `events.jsonl` holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    v: Literal[1] = 1
    """Version of this form; readers ignore events of a version they don't know."""
    seq: int = Field(ge=1)
    """1 for the first, without a gap: in events.jsonl the number of the line."""
    time: float
    """Seconds since 1970."""
    type: EventType
    """What kind of `data` follows."""
    data: SerializeAsAny[AnyData]

    def line(self) -> bytes:
        """The event as one line of JSON; numbers that are not finite become null."""
        record = plain_json(self.model_dump(mode="json"))
        return (json.dumps(record, allow_nan=False) + "\n").encode()


def _event_of(kind: type[EventData]) -> type[Event]:
    """`Event` whose `type` and `data` are held to each other."""
    fields: dict[str, Any] = {"type": Literal[kind.type], "data": kind}
    return create_model(f"{kind.__name__}Event", __base__=Event, __doc__=kind.__doc__, **fields)


_OF_EACH_TYPE: Any = Union[tuple(_event_of(kind) for kind in _DATA)]  # noqa: UP007 - no union of names, but of a tuple
_ANY_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[_OF_EACH_TYPE, Field(discriminator="type")])


def parse_event(line: str | bytes) -> Event:
    """The event in a line of `events.jsonl`.

    Raises:
        pydantic.ValidationError: it is none of this version.
    """
    return _ANY_EVENT.validate_json(line)


def events_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of one event."""
    schema = _ANY_EVENT.json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Event", **schema}


Listener = Callable[[Event], None]


class EventStream:
    """Numbers events and hands each to every listener, in the order in which they were told; from any thread."""

    def __init__(self, listeners: Iterable[Listener] = (), *, last_seq: int = 0) -> None:
        """`last_seq` is the number of the event before the first one."""
        self.listeners = list(listeners)
        self._seq = last_seq
        self._lock = threading.RLock()
        self._waiting: deque[Event] = deque()
        self._is_telling = False

    def tell(self, data: AnyData) -> None:
        """Hands on the next event; what a listener tells meanwhile comes after it.

        An error of a listener is the caller's: it is raised here, and the listeners behind it do not get that event.
        """
        with self._lock:
            self._seq += 1
            self._waiting.append(Event(seq=self._seq, time=time.time(), type=data.type, data=data))
            if self._is_telling:
                return
            self._is_telling = True
            try:
                while self._waiting:
                    event = self._waiting.popleft()
                    for listener in self.listeners:
                        listener(event)
            finally:
                self._is_telling = False

    def relay(self, event: Event) -> None:
        """Tells what another stream told, under a number of this one: the listener of an engine within a run."""
        self.tell(event.data)
