"""Rounds, their pairs, and what people and reward services said of them.

Events of feedback are appended and never changed: the newest one of a (pair, rater) counts, and taking one back appends
another.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fdfo_engine.serve.database import Database, as_text, digest
from fdfo_engine.serve.problems import Problem

RoundState = Literal["open", "sealed", "trained"]
RoundKind = Literal["training", "comparison"]
COMPARISON_OPERATION = "compare"
MAX_PROMPTS = 4096
"""Pairs of one round at most."""

_ROUNDS = """
    SELECT rounds.*, seq, operations.kind AS operation_kind FROM rounds JOIN operations ON operations.id = operation
"""
_EVENTS = """
    SELECT feedback.*, EXISTS (SELECT 1 FROM feedback AS later WHERE later.withdrawn = feedback.event) AS is_withdrawn
    FROM feedback JOIN pairs USING (pair)
    WHERE round = ? AND feedback.withdrawn IS NULL
"""
_OPINIONS = """
    SELECT * FROM feedback JOIN pairs USING (pair)
    WHERE round = ? AND event = (
        SELECT max(newer.event) FROM feedback AS newer
        WHERE newer.pair = feedback.pair AND newer.rater = feedback.rater AND newer.withdrawn IS NULL
            AND NOT EXISTS (SELECT 1 FROM feedback AS later WHERE later.withdrawn = newer.event)
    )
"""


@dataclass(frozen=True)
class StoredPair:
    """A pair that a round shows: ids of its images by branch."""

    pair: int
    prompt: str
    distance: float
    images: tuple[str, str]


@dataclass(frozen=True)
class Opinion:
    """What a rater said of a pair: rewards of both branches, None without an opinion."""

    event: int
    pair: int
    rater: str
    kind: str
    rewards: tuple[float | None, float | None]
    details: dict[str, Any]
    time: float
    is_withdrawn: bool = False


class Rounds:
    """Rounds of a database, from any thread. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_round(
        self, name: str, operation: int, *, first_pair: int, sampled: int, weights_version: int, epoch: int,
        pairs: Sequence[StoredPair],
    ) -> None:  # fmt: skip
        """Records a sampled round with the pairs that it shows; a second time changes nothing."""
        with self._database.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO rounds VALUES (?, ?, 'open', ?, ?, ?, ?)",
                (name, operation, first_pair, sampled, weights_version, epoch),
            )
            db.executemany(
                "INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?, ?)",
                [(p.pair, name, p.prompt, p.distance, *p.images) for p in pairs],
            )

    def round(self, name: str) -> dict[str, Any] | None:
        """The row of a round, with its `kind`."""
        with self._database.transaction() as db:
            row = db.execute(_ROUNDS + " WHERE rounds.id = ?", (name,)).fetchone()
            return None if row is None else _round(row)

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds, oldest first, each with its `kind` and the `seq` of the primitive that sampled it, or None."""
        with self._database.transaction() as db:
            return [_round(row) for row in db.execute(_ROUNDS + " ORDER BY operation")]

    def set_round_state(self, name: str, state: RoundState) -> None:
        """Moves a round on."""
        with self._database.transaction() as db:
            db.execute("UPDATE rounds SET state = ? WHERE id = ?", (state, name))

    def pairs(self, name: str) -> list[StoredPair]:
        """The pairs that a round shows, in the order of their index."""
        with self._database.transaction() as db:
            rows = db.execute("SELECT * FROM pairs WHERE round = ? ORDER BY pair", (name,))
            return [_pair(row) for row in rows]

    def pair_of_image(self, image: str) -> tuple[StoredPair, str] | None:
        """The pair and the round of an image."""
        with self._database.transaction() as db:
            row = db.execute("SELECT * FROM pairs WHERE ? IN (image_0, image_1)", (image,)).fetchone()
            return None if row is None else (_pair(row), row["round"])

    def add_feedback(self, name: str, opinions: Sequence[Mapping[str, Any]], *, key: str | None = None) -> list[int]:
        """Appends opinions on pairs of the open round `name`; returns the events' ids, once they are on disk.

        Each has `pair`, `rater`, `kind`, `rewards` of both branches (or None) and `details`; all or none is recorded.

        Raises:
            Problem: the round is sealed (409); the key was used with another body (422).
        """
        text = as_text({"round": name, "opinions": list(opinions)})
        with self._database.transaction() as db:
            if key is not None and (known := self._known_answer(db, key, digest("feedback", text))) is not None:
                return [int(event) for event in known["events"]]
            self._require_open(db, name)
            events = [self._append(db, opinion) for opinion in opinions]
            if key is not None:
                answer = as_text({"events": events})
                db.execute("INSERT INTO answers VALUES (?, ?, ?)", (key, digest("feedback", text), answer))
            return events

    def withdraw(self, name: str, event: int) -> tuple[int, int | None]:
        """Takes an opinion back; returns its pair, and the event that then counts for that pair and rater, or None.

        Raises:
            Problem: no such event (404); the round is sealed (409).
        """
        with self._database.transaction() as db:
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
        with self._database.transaction() as db:
            return int(db.execute("SELECT coalesce(max(event), 0) FROM feedback").fetchone()[0])

    def seal(self, name: str) -> None:
        """Closes an open round to further feedback; a sealed one stays sealed."""
        with self._database.transaction() as db:
            db.execute("UPDATE rounds SET state = 'sealed' WHERE id = ? AND state = 'open'", (name,))

    def opinions(self, name: str) -> list[Opinion]:
        """What counts: of each pair of a round and each rater the newest event that was not taken back."""
        with self._database.transaction() as db:
            return [_opinion(row) for row in db.execute(_OPINIONS + " ORDER BY event", (name,))]

    def events(self, name: str) -> list[Opinion]:
        """Every opinion on a round's pairs, oldest first, with those that were replaced or taken back."""
        with self._database.transaction() as db:
            return [_opinion(row) for row in db.execute(_EVENTS + " ORDER BY event", (name,))]

    def _require_open(self, db: sqlite3.Connection, name: str) -> None:
        state = db.execute("SELECT state FROM rounds WHERE id = ?", (name,)).fetchone()[0]
        if state != "open":
            raise Problem(409, "round_sealed", f"round {name} is {state}: its feedback cannot change any more")

    def _append(self, db: sqlite3.Connection, opinion: Mapping[str, Any]) -> int:
        cursor = db.execute(
            "INSERT INTO feedback (pair, rater, kind, reward_0, reward_1, details, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                opinion["pair"], opinion["rater"], opinion["kind"], *opinion["rewards"], as_text(opinion["details"]),
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


def _pair(row: sqlite3.Row) -> StoredPair:
    return StoredPair(row["pair"], row["prompt"], row["distance"], (row["image_0"], row["image_1"]))


def _round(row: sqlite3.Row) -> dict[str, Any]:
    kind: RoundKind = "comparison" if row["operation_kind"] == COMPARISON_OPERATION else "training"
    return dict(row) | {"kind": kind}


def _opinion(row: sqlite3.Row) -> Opinion:
    rewards = row["reward_0"], row["reward_1"]
    is_withdrawn = "is_withdrawn" in row.keys() and bool(row["is_withdrawn"])  # noqa: SIM118 - a Row holds values
    return Opinion(
        row["event"], row["pair"], row["rater"], row["kind"], rewards, json.loads(row["details"]), row["time"],
        is_withdrawn,
    )  # fmt: skip
