"""One SQLite file of the run folder: what was acknowledged. A write is on disk when its transaction has ended."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.durable import plain_json
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.serve.problems import Problem

STORE_NAME = "serve.sqlite"
VERSION = 1

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


_OF_THE_STORAGE = (
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
)  # fmt: skip
"""Primary result codes that say nothing about the statement."""


class Database:
    """The connection, used from any thread; WAL, synchronous FULL."""

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

    def _create(self) -> None:
        self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing of what happens within; on disk when it ends.

        Raises:
            Problem: the storage refuses (507).
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.DatabaseError) and error.sqlite_errorcode & 0xFF in _OF_THE_STORAGE:
                    raise Problem(507, "storage", f"{self.path.name}: {error}") from error
                raise


def as_text(value: Any) -> str:
    """The JSON of a value, the same for equal values."""
    return json.dumps(plain_json(value), sort_keys=True, separators=(",", ":"))


def digest(kind: str, text: str) -> str:
    """By which two requests are held against each other."""
    return hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()
