"""What every shipped config is predicted to need of GPUs of common sizes: `python -m benchmarks.memory_table`.

Predictions of `fdfo plan`, on diffusers' own blocks: nothing is loaded or measured. Prints the table of docs/MEMORY.md.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import RESULTS, ROOT
from fdfo_engine.bench.record import header, write
from fdfo_engine.config import load_config
from fdfo_engine.planning.fit import reward_bytes
from fdfo_engine.planning.footprint import Footprint, blank_footprint
from fdfo_engine.planning.memory import GIB, choose_micro_batch
from fdfo_engine.runtime.errors import UsageError

CARDS = (16, 24, 48, 80, 141)
CONFIGS = (
    "sd35m_16gb", "sd35m_pickscore", "sd35m_combined", "sd35l", "flux1_dev_24gb", "flux1_dev", "qwen_image",
)  # fmt: skip


def main() -> None:
    """Plans each config on each card, writes `results/memory_table.json` and prints the table."""
    rows = [row for name in CONFIGS for row in planned(name)]
    write(RESULTS / "memory_table.json", header("python -m benchmarks.memory_table", sys.argv[1:]) | {"rows": rows})
    print("| config | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---" * (len(CARDS) + 1) + "|")
    for name in CONFIGS:
        cells = [_cell(row) for row in rows if row["config"] == name]
        print(f"| `{name}` | " + " | ".join(cells) + " |")


def planned(name: str) -> list[dict[str, Any]]:
    """One row a card: the micro-batch that is chosen and GiB that are needed on one GPU, None where it does not fit."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    counted, scorers = blank_footprint(config), reward_bytes(config)
    return [{"config": name, "gpu_gb": card} | _fit(config, counted, scorers, card) for card in CARDS]


def _fit(config: Any, counted: Footprint, scorers: int, card: int) -> dict[str, Any]:
    try:
        found = choose_micro_batch(counted, config, 1, card * GIB, scorers)
    except UsageError:
        return {"micro_batch": None, "needed_gib": None}
    return {"micro_batch": found.micro_batch, "needed_gib": round(found.needed / GIB, 2)}


def _cell(row: dict[str, Any]) -> str:
    return "-" if row["micro_batch"] is None else f"{row['micro_batch']} ({row['needed_gib']:.1f})"


if __name__ == "__main__":
    main()
