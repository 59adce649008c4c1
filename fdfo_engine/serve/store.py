"""What was acknowledged, in one SQLite file of the run folder: operations, rounds, pairs and feedback.

A write is on disk when the call returns (WAL, synchronous FULL). Events of feedback are appended and never changed: the
newest one of a (pair, rater) counts, and taking one back appends another.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fdfo_engine.runtime.durable import plain_json
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.serve.problems import Problem

STORE_NAME = "serve.sqlite"
VERSION = 1
OperationState = Literal["queued", "running", "done", "failed"]
RoundState = Literal["sampling", "open", "sealed", "trained", "failed"]

_SCHEMA = """
CREATE TABLE operations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    body_hash TEXT NOT NULL,
    seq INTEGER UNIQUE,
    key TEXT UNIQUE,
    state TEXT NOT NULL DEFAULT 'queued',
    result TEXT,
    problem TEXT,
    created REAL NOT NULL,
    finished REAL
);
CREATE TABLE rounds (
    id TEXT PRIMARY KEY,
    operation INTEGER NOT NULL REFERENCES operations (id),
    state TEXT NOT NULL,
    first_pair INTEGER NOT NULL,
    sampled INTEGER NOT NULL,
    weights_version INTEGER NOT NULL,
    epoch INTEGER NOT NULL
);
CREATE TABLE pairs (
    pair INTEGER PRIMARY KEY,
    round TEXT NOT NULL REFERENCES rounds (id),
    prompt TEXT NOT NULL,
    distance REAL NOT NULL,
    image_0 TEXT NOT NULL UNIQUE,
    image_1 TEXT NOT NULL UNIQUE
);
CREATE INDEX pairs_of_round ON pairs (round);
CREATE TABLE feedback (
    event INTEGER PRIMARY KEY AUTOINCREMENT,
    pair INTEGER NOT NULL REFERENCES pairs (pair),
    rater TEXT NOT NULL,
    kind TEXT NOT NULL,
    reward_0 REAL,
    reward_1 REAL,
    details TEXT NOT NULL,
    withdrawn INTEGER REFERENCES feedback (event),
    time REAL NOT NULL
);
CREATE INDEX feedback_of_pair ON feedback (pair, rater, event);
CREATE TABLE answers (
    key TEXT PRIMARY KEY,
    body_hash TEXT NOT NULL,
    answer TEXT NOT NULL
);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Operation:
    """One entry of the queue, and what became of it."""

    id: int
    kind: str
    body: dict[str, Any]
    seq: int | None
    state: OperationState
    result: dict[str, Any] | None
    problem: dict[str, Any] | None
    created: float
    finished: float | None

    @property
    def is_over(self) -> bool:
        """Whether it is done or has failed."""
        return self.state in ("done", "failed")


@dataclass(frozen=True)
class StoredPair:
    """A pair that a round shows: ids of its images by branch."""

    pair: int
    prompt: str
    distance: float
    images: tuple[str, str]


@dataclass(frozen=True)
class Opinion:
    """What a rater last said of a pair: rewards of both branches, None without an opinion."""

    event: int
    pair: int
    rater: str
    kind: str
    rewards: tuple[float | None, float | None]
    details: dict[str, Any]
    time: float


class Store:
    """The file, from any thread. Each method is one transaction."""

    def __init__(self, folder: Path) -> None:
        """Opens `folder/serve.sqlite`, or makes it.

        Raises:
            CheckpointError: it is damaged, or a later version's.
        """
        self.path = folder / STORE_NAME
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._create()
        except sqlite3.DatabaseError as error:
            raise CheckpointError(f"{self.path}: {error}; move it away to start without its rounds") from error
        if version > VERSION:
            raise CheckpointError(f"{self.path}: of version {version}, this is {VERSION}; install a newer fdfo-engine")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    # operations

    def enqueue(
        self, kind: str, body: Mapping[str, Any], *, key: str | None = None, seq: int | None = None
    ) -> Operation:
        """Queues an operation; the same `key`, or the same `seq`, gives the one that was queued before.

        Raises:
            Problem: the key or number was used with another body (422); the number is not the next one (409).
        """
        text = _text(body)
        hashed = _hash(kind, text)
        with self._transaction() as db:
            if (known := self._known(db, hashed, key, seq)) is not None:
                return known
            if seq is not None and seq != (expected := self._expected_seq(db)):
                raise seq_gap(seq, expected)
            cursor = db.execute(
                "INSERT INTO operations (kind, body, body_hash, seq, key, created) VALUES (?, ?, ?, ?, ?, ?)",
                (kind, text, hashed, seq, key, time.time()),
            )
            return self._operation(db, cursor.lastrowid)

    def operation(self, number: int) -> Operation | None:
        """The operation with the id `number`."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM operations WHERE id = ?", (number,)).fetchone()
            return None if row is None else _operation(row)

    def operations(self, *states: OperationState, after: int = 0) -> list[Operation]:
        """Those in one of `states` behind the id `after`, oldest first."""
        marks = ", ".join("?" * len(states))
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT * FROM operations WHERE state IN ({marks}) AND id > ? ORDER BY id",
                (*states, after),
            )
            return [_operation(row) for row in rows]

    def with_key(self, key: str, kind: str, body: Mapping[str, Any]) -> Operation | None:
        """What was queued under an Idempotency-Key before.

        Raises:
            Problem: with another body (422).
        """
        with self._transaction() as db:
            return self._known(db, _hash(kind, _text(body)), key, None)

    def start_next(self) -> Operation | None:
        """The oldest queued operation, which is then running."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM operations WHERE state = 'queued' ORDER BY id LIMIT 1").fetchone()
            if row is None:
                return None
            db.execute("UPDATE operations SET state = 'running' WHERE id = ?", (row["id"],))
            return self._operation(db, row["id"])

    def finish(self, number: int, result: Mapping[str, Any] | None, problem: Mapping[str, Any] | None = None) -> None:
        """Records how an operation ended."""
        state = "done" if problem is None else "failed"
        with self._transaction() as db:
            db.execute(
                "UPDATE operations SET state = ?, result = ?, problem = ?, finished = ? WHERE id = ?",
                (state, _optional(result), _optional(problem), time.time(), number),
            )

    def requeue(self, number: int) -> None:
        """What a killed process was amid runs again from its start."""
        with self._transaction() as db:
            db.execute("UPDATE operations SET state = 'queued' WHERE id = ?", (number,))

    @property
    def expected_seq(self) -> int:
        """The number that the next primitive bears."""
        with self._transaction() as db:
            return self._expected_seq(db)

    def _known(self, db: sqlite3.Connection, hashed: str, key: str | None, seq: int | None) -> Operation | None:
        for column, value in (("key", key), ("seq", seq)):
            if value is None:
                continue
            row = db.execute(f"SELECT * FROM operations WHERE {column} = ?", (value,)).fetchone()
            if row is None:
                continue
            if row["body_hash"] != hashed:
                name = "Idempotency-Key" if column == "key" else "seq"
                raise Problem(
                    422, f"{column}_reused", f"{name} {value!r} was used with another request", fix="take a new one"
                )
            return _operation(row)
        return None

    def _expected_seq(self, db: sqlite3.Connection) -> int:
        return int(db.execute("SELECT coalesce(max(seq), 0) + 1 FROM operations").fetchone()[0])

    def _operation(self, db: sqlite3.Connection, number: int | None) -> Operation:
        return _operation(db.execute("SELECT * FROM operations WHERE id = ?", (number,)).fetchone())

    # rounds

    def add_round(
        self, name: str, operation: int, *, first_pair: int, sampled: int, weights_version: int, epoch: int,
        pairs: Sequence[StoredPair],
    ) -> None:  # fmt: skip
        """Records a sampled round with the pairs that it shows; a second time changes nothing."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO rounds VALUES (?, ?, 'open', ?, ?, ?, ?)",
                (name, operation, first_pair, sampled, weights_version, epoch),
            )
            db.executemany(
                "INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?, ?)",
                [(p.pair, name, p.prompt, p.distance, *p.images) for p in pairs],
            )

    def round(self, name: str) -> dict[str, Any] | None:
        """The row of a round."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM rounds WHERE id = ?", (name,)).fetchone()
            return None if row is None else dict(row)

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds, oldest first, each with the `seq` of the primitive that sampled it, or None."""
        query = "SELECT rounds.*, seq FROM rounds JOIN operations ON operations.id = operation ORDER BY operation"
        with self._transaction() as db:
            return [dict(row) for row in db.execute(query)]

    def set_round_state(self, name: str, state: RoundState) -> None:
        """Moves a round on."""
        with self._transaction() as db:
            db.execute("UPDATE rounds SET state = ? WHERE id = ?", (state, name))

    def pairs(self, name: str) -> list[StoredPair]:
        """The pairs that a round shows, in the order of their index."""
        with self._transaction() as db:
            rows = db.execute("SELECT * FROM pairs WHERE round = ? ORDER BY pair", (name,))
            return [_pair(row) for row in rows]

    def pair_of_image(self, image: str) -> tuple[StoredPair, str] | None:
        """The pair and the round of an image."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM pairs WHERE ? IN (image_0, image_1)", (image,)).fetchone()
            return None if row is None else (_pair(row), row["round"])

    # feedback

    def add_feedback(self, name: str, opinions: Sequence[Mapping[str, Any]], *, key: str | None = None) -> list[int]:
        """Appends opinions on pairs of the open round `name`; returns the events' ids, once they are on disk.

        Each has `pair`, `rater`, `kind`, `rewards` of both branches (or None) and `details`; all or none is recorded.

        Raises:
            Problem: the round is sealed (409); the key was used with another body (422).
        """
        text = _text({"round": name, "opinions": list(opinions)})
        with self._transaction() as db:
            if key is not None and (known := self._known_answer(db, key, _hash("feedback", text))) is not None:
                return [int(event) for event in known["events"]]
            self._require_open(db, name)
            events = [self._append(db, opinion) for opinion in opinions]
            if key is not None:
                answer = _text({"events": events})
                db.execute("INSERT INTO answers VALUES (?, ?, ?)", (key, _hash("feedback", text), answer))
            return events

    def withdraw(self, name: str, event: int) -> tuple[int, int | None]:
        """Takes an opinion back; returns its pair, and the event that then counts for that pair and rater, or None.

        Raises:
            Problem: no such event (404); the round is sealed (409).
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT feedback.* FROM feedback JOIN pairs USING (pair)"
                " WHERE event = ? AND round = ? AND withdrawn IS NULL",
                (event, name),
            ).fetchone()
            if row is None:
                raise Problem(404, "no_feedback", f"round {name} has no feedback event {event}")
            self._require_open(db, name)
            if db.execute("SELECT 1 FROM feedback WHERE withdrawn = ?", (event,)).fetchone() is None:
                db.execute(
                    "INSERT INTO feedback (pair, rater, kind, details, withdrawn, time) VALUES (?, ?, ?, '{}', ?, ?)",
                    (row["pair"], row["rater"], "withdrawal", event, time.time()),
                )
            counting = db.execute(
                _OPINIONS + " AND feedback.pair = ? AND rater = ?", (name, row["pair"], row["rater"])
            ).fetchone()  # fmt: skip
            return row["pair"], None if counting is None else counting["event"]

    @property
    def last_feedback(self) -> int:
        """Id of the newest event of feedback; 0 before the first."""
        with self._transaction() as db:
            return int(db.execute("SELECT coalesce(max(event), 0) FROM feedback").fetchone()[0])

    def seal(self, name: str) -> None:
        """Closes an open round to further feedback; a sealed one stays sealed."""
        with self._transaction() as db:
            db.execute("UPDATE rounds SET state = 'sealed' WHERE id = ? AND state = 'open'", (name,))

    def opinions(self, name: str) -> list[Opinion]:
        """What counts: of each pair of a round and each rater the newest event that was not taken back."""
        with self._transaction() as db:
            return [_opinion(row) for row in db.execute(_OPINIONS + " ORDER BY event", (name,))]

    def _require_open(self, db: sqlite3.Connection, name: str) -> None:
        state = db.execute("SELECT state FROM rounds WHERE id = ?", (name,)).fetchone()[0]
        if state != "open":
            raise Problem(409, "round_sealed", f"round {name} is {state}: its feedback cannot change any more")

    def _append(self, db: sqlite3.Connection, opinion: Mapping[str, Any]) -> int:
        cursor = db.execute(
            "INSERT INTO feedback (pair, rater, kind, reward_0, reward_1, details, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                opinion["pair"], opinion["rater"], opinion["kind"], *opinion["rewards"], _text(opinion["details"]),
                time.time(),
            ),
        )  # fmt: skip
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _known_answer(self, db: sqlite3.Connection, key: str, hashed: str) -> dict[str, Any] | None:
        row = db.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row["body_hash"] != hashed:
            raise Problem(
                422, "key_reused", f"Idempotency-Key {key!r} was used with another request", fix="take a new one"
            )
        answer: dict[str, Any] = json.loads(row["answer"])
        return answer

    # facts

    def fact(self, name: str) -> Any:
        """A value kept under `name`, or None."""
        with self._transaction() as db:
            row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            return None if row is None else json.loads(row["value"])

    def set_fact(self, name: str, value: Any) -> None:
        """Keeps a value under `name`."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def _create(self) -> None:
        self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            try:
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                self._db.execute("ROLLBACK")
                raise Problem(507, "storage", f"{self.path.name}: {error}") from error


_OPINIONS = """
    SELECT * FROM feedback JOIN pairs USING (pair)
    WHERE round = ? AND event = (
        SELECT max(newer.event) FROM feedback AS newer
        WHERE newer.pair = feedback.pair AND newer.rater = feedback.rater AND newer.withdrawn IS NULL
            AND NOT EXISTS (SELECT 1 FROM feedback AS later WHERE later.withdrawn = newer.event)
    )
"""


def seq_gap(seq: int, expected: int) -> Problem:
    """The answer to a number that is not the next one."""
    return Problem(
        409, "seq_gap", f"seq {seq} came where {expected} is next", fix=f"send {expected} first", expected_seq=expected
    )


def _operation(row: sqlite3.Row) -> Operation:
    return Operation(
        id=row["id"], kind=row["kind"], body=json.loads(row["body"]), seq=row["seq"], state=row["state"],
        result=_parsed(row["result"]), problem=_parsed(row["problem"]), created=row["created"],
        finished=row["finished"],
    )  # fmt: skip


def _pair(row: sqlite3.Row) -> StoredPair:
    return StoredPair(row["pair"], row["prompt"], row["distance"], (row["image_0"], row["image_1"]))


def _opinion(row: sqlite3.Row) -> Opinion:
    rewards = row["reward_0"], row["reward_1"]
    return Opinion(
        row["event"], row["pair"], row["rater"], row["kind"], rewards, json.loads(row["details"]), row["time"]
    )  # fmt: skip


def _text(value: Any) -> str:
    return json.dumps(plain_json(value), sort_keys=True, separators=(",", ":"))


def _hash(kind: str, text: str) -> str:
    return hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()


def _optional(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else _text(value)


def _parsed(text: str | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(text)
