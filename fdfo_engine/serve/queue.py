"""The queue: operations in the order in which they came, and a few facts that outlive a process."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fdfo_engine.serve.database import Database, as_text, digest
from fdfo_engine.serve.problems import Problem

OperationState = Literal["queued", "running", "done", "failed"]


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


class Queue:
    """Operations of a database, from any thread. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def enqueue(
        self, kind: str, body: Mapping[str, Any], *, key: str | None = None, seq: int | None = None
    ) -> Operation:
        """Queues an operation; the same `key`, or the same `seq`, gives the one that was queued before.

        Raises:
            Problem: the key or number was used with another body (422); the number is not the next one (409).
        """
        text = as_text(body)
        hashed = digest(kind, text)
        with self._database.transaction() as db:
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
        with self._database.transaction() as db:
            row = db.execute("SELECT * FROM operations WHERE id = ?", (number,)).fetchone()
            return None if row is None else _operation(row)

    def operations(self, *states: OperationState, after: int = 0) -> list[Operation]:
        """Those in one of `states` behind the id `after`, oldest first."""
        marks = ", ".join("?" * len(states))
        with self._database.transaction() as db:
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
        with self._database.transaction() as db:
            return self._known(db, digest(kind, as_text(body)), key, None)

    def start_next(self) -> Operation | None:
        """The oldest queued operation, which is then running."""
        with self._database.transaction() as db:
            row = db.execute("SELECT * FROM operations WHERE state = 'queued' ORDER BY id LIMIT 1").fetchone()
            if row is None:
                return None
            db.execute("UPDATE operations SET state = 'running' WHERE id = ?", (row["id"],))
            return self._operation(db, row["id"])

    def finish(self, number: int, result: Mapping[str, Any] | None, problem: Mapping[str, Any] | None = None) -> None:
        """Records how an operation ended."""
        state = "done" if problem is None else "failed"
        with self._database.transaction() as db:
            db.execute(
                "UPDATE operations SET state = ?, result = ?, problem = ?, finished = ? WHERE id = ?",
                (state, _optional(result), _optional(problem), time.time(), number),
            )

    def requeue(self, number: int) -> None:
        """What a killed process was amid runs again from its start."""
        with self._database.transaction() as db:
            db.execute("UPDATE operations SET state = 'queued' WHERE id = ?", (number,))

    @property
    def expected_seq(self) -> int:
        """The number that the next primitive bears."""
        with self._database.transaction() as db:
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

    def fact(self, name: str) -> Any:
        """A value kept under `name`, or None."""
        with self._database.transaction() as db:
            row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            return None if row is None else json.loads(row["value"])

    def set_fact(self, name: str, value: Any) -> None:
        """Keeps a value under `name`."""
        with self._database.transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


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


def _optional(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else as_text(value)


def _parsed(text: str | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(text)
