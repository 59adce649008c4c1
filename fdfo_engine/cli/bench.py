"""`fdfo bench`: how fast whole transformers sample and train here, plain and fused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ARCHITECTURES = ("shapes", "blocks", "sd35-medium", "sd35-large", "flux1-dev")
LETTERS = "RECFTG"
"""Candidates, in the order in which they are made."""


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "bench",
        help="measure whole transformers on this machine, plain and fused",
        description="Measures rollout and training rate, share of the matmul rate and memory of transformers with "
        "random weights, plain diffusers (R, E), compiled (C) and fused (F) in turn, and writes a results file. Under "
        "torchrun every rank measures its own GPU and the sum is reported.",
    )
    parse.add_argument(
        "--arch", nargs="+", choices=ARCHITECTURES, help="default: sd35-medium on a GPU, shapes and blocks on a CPU"
    )
    parse.add_argument(
        "--candidates", default="RECF", type=_letters, help="letters out of RECFTG; R always is; default RECF"
    )
    parse.add_argument("--rollout-batch", type=positive, help="images in a forward; default by architecture")
    parse.add_argument("--train-batch", type=positive, help="items in a micro-batch; default by architecture")
    parse.add_argument("--threads", type=positive, help="on a CPU; default: torch's own choice")
    parse.add_argument("--seconds", type=float, default=5.0, help="about, a candidate and step; default 5")
    parse.add_argument(
        "--out", type=Path, default=Path("fdfo_bench.json"), help="the file to write; default %(default)s"
    )
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures."""
    from fdfo_engine.bench import end_to_end

    return end_to_end.run(arguments)


def _letters(text: str) -> str:
    if not text or set(text) - set(LETTERS):
        raise argparse.ArgumentTypeError(f"{text!r}: takes letters out of {LETTERS}")
    return "".join(letter for letter in LETTERS if letter in "R" + text)  # R comes first: it sets the others' bound


def positive(text: str) -> int:
    """A whole number from 1, as the value of an option."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: takes a whole number from 1")
    return int(text)
