"""What people said of pairs of images: records, statistics, export. Imports no torch."""

from fdfo_engine.choices.records import Choice
from fdfo_engine.choices.statistics import (
    Comparison,
    RaterSummary,
    Share,
    agreement,
    compared,
    hints_to_stop,
    kappa,
    sign_test,
    summary,
    wilson,
)

__all__ = [
    "Choice",
    "Comparison",
    "RaterSummary",
    "Share",
    "agreement",
    "compared",
    "hints_to_stop",
    "kappa",
    "sign_test",
    "summary",
    "wilson",
]
