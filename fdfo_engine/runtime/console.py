"""What a person reads in the terminal: whole lines, from rank 0 only, and never a raw control character."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def visible(text: str) -> str:
    """`text` on one line, with control and other unprintable characters (ANSI escapes, newlines) shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def say(line: str) -> None:
    """Writes one line to stdout, on rank 0 only."""
    _write(sys.stdout, line)


def warn(line: str) -> None:
    """Writes `warning: <line>` to stderr, on rank 0 only."""
    _write(sys.stderr, f"warning: {line}")


def complain(block: str, *, everywhere: bool = False) -> None:
    """Writes a block of lines to stderr, on rank 0 only, or `everywhere` with the rank's number in front."""
    if everywhere and not is_printing_rank():
        sys.stderr.write(f"rank {os.environ['RANK']}: {block}\n")
    _write(sys.stderr, block)


def is_printing_rank() -> bool:
    """Whether this process is rank 0 by the launcher's environment; true before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def _write(stream: TextIO, text: str) -> None:
    if is_printing_rank():
        print(text, file=stream, flush=True)
