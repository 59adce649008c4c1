"""The choices that a run folder keeps, read from the server's store without a server."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fdfo_engine.choices.records import Choice
from fdfo_engine.runtime.errors import CheckpointError, UsageError

STORE_NAME = "serve.sqlite"
IMAGES_FOLDER = Path("serve") / "images"
_CHOICES = """
    SELECT feedback.*, pairs.*, operations.kind AS operation, epoch,
        EXISTS (SELECT 1 FROM feedback AS later WHERE later.withdrawn = feedback.event) AS is_withdrawn
    FROM feedback JOIN pairs USING (pair) JOIN rounds ON rounds.id = round JOIN operations ON operations.id = operation
    WHERE feedback.kind = 'choice' ORDER BY event
"""


@dataclass(frozen=True)
class Judged:
    """A choice with what was judged.

    Attributes:
        choice: the answer. prompt: of both images. images: files of branch 0 and branch 1, which may be gone.
        epoch: after which the weights were that drew them.
    """

    choice: Choice
    prompt: str
    images: tuple[Path, Path]
    epoch: int


def has_choices(folder: Path) -> bool:
    """Whether somebody was asked in the run of `folder`, as far as the files say."""
    return (folder / STORE_NAME).is_file()


def read_choices(folder: Path) -> list[Judged]:
    """Every choice of the run in `folder`, oldest first, with those that were replaced or taken back.

    Raises:
        UsageError: nobody ever served that run. CheckpointError: its store cannot be read.
    """
    path = folder / STORE_NAME
    if not path.is_file():
        raise UsageError(f"{folder}: holds no choices: there is no {STORE_NAME}")
    try:
        with _opened(path) as db:
            return [_judged(folder, row) for row in db.execute(_CHOICES)]
    except sqlite3.DatabaseError as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        yield db


def _judged(folder: Path, row: sqlite3.Row) -> Judged:
    details = json.loads(row["details"])
    choice = Choice(
        event=row["event"], round=row["round"], pair=row["pair"], rater=row["rater"], choice=details["choice"],
        rewards=(row["reward_0"], row["reward_1"]), is_comparison=row["operation"] == "compare",
        is_repeat=bool(details.get("swapped")), is_withdrawn=bool(row["is_withdrawn"]), ms=details.get("ms"),
        flips=details.get("flips"), zooms=details.get("zooms"), time=row["time"],
    )  # fmt: skip
    first, second = (folder / IMAGES_FOLDER / f"{row[name]}.png" for name in ("image_0", "image_1"))
    return Judged(choice, row["prompt"], (first, second), row["epoch"])
