"""The pictures of `docs/EVIDENCE.md`, by matplotlib from the results files alone; for `benchmarks.evidence_page`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.evidence_axes import Finals, Record, axes, paired_differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "fdfo": "#0072B2",
    "flow_grpo": "#D55E00",
    "awm": "#009E73",
    "nft": "#CC79A7",
}  # told apart by the colour-blind
STYLE = {"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
COUNTS = {"images": "images", "evaluations": "network evaluations", "seconds": "seconds of training, one thread"}


def curves(finals: Finals, out: Path) -> None:
    """Held-out reward over images, network evaluations and seconds: median of the seeds, and all of them as a band."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
        for panel, (count, label) in zip(panels, COUNTS.items(), strict=True):
            for method, records in finals.items():
                _band(panel, method, records, count)
            panel.set_xlabel(label)
        panels[0].set_ylabel("held-out reward")
        panels[0].legend()
        _write(figure, out)


def diversity(finals: Finals, out: Path) -> None:
    """Diversity against reward along each run: at equal reward, higher is better."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
        for method, records in finals.items():
            for index, record in enumerate(records):
                rewards = [point["reward"] for point in record["curve"]]
                spread = [point["diversity"]["pixel_diversity"] for point in record["curve"]]
                label = method if index == 0 else None
                panel.plot(rewards, spread, marker="o", markersize=3, color=COLORS[method], alpha=0.7, label=label)
        panel.set_xlabel("held-out reward")
        panel.set_ylabel("pixel diversity")
        panel.legend()
        _write(figure, out)


def options(finals: Finals, changed: Finals, out: Path) -> None:
    """What each switch of FDFO does to the final reward, seed by seed."""
    import matplotlib.pyplot as plt

    reward = axes(finals)[0]
    effects = {name: paired_differences(reward, records, finals["fdfo"]) for name, records in changed.items()}
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(6.5, 0.4 * len(effects) + 1.2), layout="constrained")
        for row, values in enumerate(effects.values()):
            panel.plot(values, [row] * len(values), "o", color=COLORS["fdfo"], alpha=0.7)
            panel.plot([statistics.median(values)], [row], "|", color="black", markersize=14)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(effects)), [name.removeprefix("fdfo+") for name in effects])
        panel.invert_yaxis()
        panel.set_xlabel("held-out reward against FDFO of the same seed")
        _write(figure, out)


def _band(panel: Axes, method: str, records: Sequence[Record], count: str) -> None:
    points = list(zip(*(record["curve"] for record in records), strict=True))
    place = [statistics.median(point[count] for point in at) for at in points]
    rewards = [[point["reward"] for point in at] for at in points]
    middle = [statistics.median(values) for values in rewards]
    panel.plot(place, middle, marker="o", markersize=3, color=COLORS[method], label=method)
    panel.fill_between(place, [min(v) for v in rewards], [max(v) for v in rewards], color=COLORS[method], alpha=0.15)


def _write(figure: object, out: Path) -> None:
    import matplotlib.pyplot as plt

    plt.savefig(out, metadata={"Date": None})
    plt.close(figure)  # type: ignore[arg-type]
