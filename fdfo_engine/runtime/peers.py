"""Which processes the ranks of a run are, so that one that is gone or hangs can be named, with what it was doing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fdfo_engine.runtime.rank_files import Sign, read_sign, stacks_path
from fdfo_engine.runtime.starting import has_ended, is_stopped

CARD_BYTES = 256
"""What `own_card` is padded to: equally long on every rank."""

_GONE_WITHIN_S = 3.0


@dataclass(frozen=True)
class Peer:
    """A rank as the others know it.

    Attributes:
        rank: its number.
        pid: its process.
        is_here: whether that is one of this host.
    """

    rank: int
    pid: int
    is_here: bool

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended; of another host that cannot be seen."""
        return self.is_here and has_ended(self.pid)

    @property
    def is_stopped(self) -> bool:
        """Whether somebody stopped its process, by SIGSTOP say."""
        return self.is_here and is_stopped(self.pid)

    def sign(self) -> Sign | None:
        """What it last said of itself, where the run has a folder for that."""
        return None if _run_dir is None else read_sign(_run_dir, self.rank, self.pid)

    def last_words(self) -> str:
        """Its name, its phase, and why it does not get on, as far as known."""
        sign = self.sign()
        if sign is None:
            return str(self)
        return f"{self}, in {sign.place}{f': {sign.stuck}' if sign.stuck else ''}{self.stacks_note()}"

    def stacks_note(self) -> str:
        """Where its stacks are, if it left any."""
        path = None if _run_dir is None else stacks_path(_run_dir, self.rank)
        return f"; its stacks: {path}" if path is not None and path.is_file() and path.stat().st_size else ""


_cards: list[bytes] = []
_run_dir: Path | None = None
_verdict = ""


def own_card() -> bytes:
    """Host and process of this rank, for the others to `remember`."""
    text = f"{os.getpid()} {socket.gethostname()}".encode()[:CARD_BYTES]
    return text.ljust(CARD_BYTES, b"\0")


def remember(cards: Sequence[bytes]) -> None:
    """Keeps the cards of all ranks, in their order."""
    _cards[:] = cards


def meet_in(run_dir: Path | None) -> None:
    """Where the ranks say what they do (`rank_files`); nothing is known of why one of them is lost."""
    global _run_dir, _verdict
    _run_dir, _verdict = run_dir, ""


def all_peers() -> list[Peer]:
    """Every rank, this one too; none where there is one rank alone."""
    found = []
    for number, card in enumerate(_cards):
        pid, host = card.rstrip(b"\0").decode(errors="replace").split(" ", 1)
        found.append(Peer(number, int(pid), host == socket.gethostname()))
    return found


def judge(verdict: str) -> None:
    """Keeps why a rank is lost, for whoever finds that it is."""
    global _verdict
    _verdict = verdict


def verdict() -> str:
    """Why a rank is lost; empty while none is."""
    return _verdict


def gone_ranks() -> list[str]:
    """The ranks on this host whose processes are gone, in words; waits some seconds for one to be."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while not (gone := [peer for peer in all_peers() if peer.is_gone]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [peer.last_words() for peer in gone]
