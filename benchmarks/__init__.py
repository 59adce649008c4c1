"""Measurements of a checkout; what measures whole transformers, and times, is `fdfo_engine.bench`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
