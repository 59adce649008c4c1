"""Which processes the ranks of a run are, so that one that is gone can be named."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from fdfo_engine.runtime.starting import has_ended

CARD_BYTES = 256
"""What `own_card` is padded to: equally long on every rank."""

_GONE_WITHIN_S = 3.0
_cards: list[bytes] = []


def own_card() -> bytes:
    """Host and process of this rank, for the others to `remember`."""
    text = f"{os.getpid()} {socket.gethostname()}".encode()[:CARD_BYTES]
    return text.ljust(CARD_BYTES, b"\0")


def remember(cards: Sequence[bytes]) -> None:
    """Keeps the cards of all ranks, in their order."""
    _cards[:] = cards


def gone_ranks() -> list[str]:
    """The ranks on this host whose processes are gone, in words; waits some seconds for one to be."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while not (gone := _gone_now()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return gone


def _gone_now() -> list[str]:
    gone = []
    for number, card in enumerate(_cards):
        pid, host = card.rstrip(b"\0").decode(errors="replace").split(" ", 1)
        if host == socket.gethostname() and has_ended(int(pid)):
            gone.append(f"rank {number} (process {pid})")
    return gone
