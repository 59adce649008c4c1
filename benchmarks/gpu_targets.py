"""What was measured beside what it should reach on an H200; see docs/BENCHMARKS.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]
OURS = ("triton", "cuda", "cpp")


class Target(NamedTuple):
    """A figure, what it should be at least, and how it is read from all parts' results."""

    name: str
    least: float
    read: Callable[[dict[str, Any]], float | None]


def of_op(suite: str, case: str, what: str) -> Callable[[dict[str, Any]], float | None]:
    """A figure of the fastest backend of ours at the first case whose name begins so."""

    def read(results: dict[str, Any]) -> float | None:
        rows: Rows = results.get(suite, {}).get("rows", [])
        ours = [row for row in rows if row["case"].startswith(case) and row["candidate"] in OURS]
        if not ours:
            return None
        best = min((row for row in ours if row["case"] == ours[0]["case"]), key=lambda row: row["median_s"])
        if what == "share of copy":
            return float(best["bytes_per_s"] / best["copy_bytes_per_s"])
        return float(best[what]) if what in best else None

    return read


def of_transformer(what: str, over: str | None = None) -> Callable[[dict[str, Any]], float | None]:
    """A figure of the fastest of our candidates, or how many times it is that of candidate `over`."""

    def read(results: dict[str, Any]) -> float | None:
        rows: Rows = results.get("bench", {}).get("rows", [])
        ours = [float(row[what]) for row in rows if row["candidate"] in "FTG"]
        others = [float(row[what]) for row in rows if row["candidate"] == over]
        if not ours or (over and not others):
            return None
        return max(ours) / (others[0] if over else 1.0)

    return read


def _ops() -> Iterator[Target]:
    """Share of the copy's bandwidth, and how many times as fast as plain torch and as inductor."""
    for suite, case, copy, eager, inductor in (
        ("block_ops", "layer_norm_modulate forward, bfloat16", 0.88, 4.0, 1.15),
        ("block_ops", "layer_norm_modulate forward + backward, bfloat16", 0.80, 4.0, 1.15),
        ("block_ops", "gated_residual_norm forward, bfloat16", 0.88, 4.5, 1.15),
        ("block_ops", "gated_residual_norm forward + backward, bfloat16", 0.82, 4.5, 1.15),
        ("attention_ops", "qk_rms_norm, forward, bfloat16", 0.85, 8.0, 1.3),
        ("attention_ops", "qk_rms_norm, forward + backward, bfloat16", 0.80, 10.0, 1.3),
    ):
        yield Target(f"{case}: share of copy", copy, of_op(suite, case, "share of copy"))
        yield Target(f"{case}: times eager", eager, of_op(suite, case, "times_eager"))
        yield Target(f"{case}: times inductor", inductor, of_op(suite, case, "times_inductor"))
    yield Target("paired_step: times eager", 8.0, of_op("pair_ops", "paired_step,", "times_eager"))
    yield Target("fdfo_loss: times eager", 10.0, of_op("pair_ops", "fdfo_loss", "times_eager"))


TARGETS = [
    *_ops(),
    Target("images/s of SD3.5-Medium, 40 steps", 6.0, of_transformer("images_per_s")),
    Target("training samples/s of SD3.5-Medium", 100.0, of_transformer("training_samples_per_s")),
    Target("rollout: times plain diffusers", 2.2, of_transformer("images_per_s", "R")),
    Target("rollout: times compiled", 1.25, of_transformer("images_per_s", "C")),
    Target("training: times plain diffusers", 2.2, of_transformer("training_samples_per_s", "R")),
    Target("training: times compiled", 1.3, of_transformer("training_samples_per_s", "C")),
    Target("share of the matmul rate, rollout", 0.70, of_transformer("mfu_rollout")),
    Target("share of the matmul rate, training", 0.64, of_transformer("mfu_training")),
]


def _machine(versions: dict[str, Any]) -> str:
    """Packages and devices in a line; packages that are missing are named too."""
    packages = versions.get("packages", {})
    here = [f"{name} {version}" for name, version in packages.items() if version]
    missing = [name for name, version in packages.items() if not version]
    devices = [str(device.get("name", device)) for device in versions.get("devices", [])]
    line = ", ".join([*devices, f"python {versions.get('python', 'unknown')}", *here])
    return f"{line}; missing: {', '.join(missing)}" if missing else line


def summary(outcomes: Sequence[dict[str, Any]]) -> str:
    """How each part went, then each figure with its target and their ratio; what was not measured says so."""
    results: dict[str, Any] = {}
    lines = []
    for outcome in outcomes:
        results |= outcome["results"]
        lines.append(f"{outcome['part']}, {outcome['seconds']} s")
        lines += [f"  {line}" for line in outcome["lines"]]
    lines = [_machine(results.get("versions", {})), *lines]
    lines += ["", f"{'':66}{'measured':>10}{'target':>8}{'ratio':>7}"]
    for target in TARGETS:
        value = target.read(results)
        shown = "  not measured" if value is None else f"{value:10.3g}{target.least:8.3g}{value / target.least:7.2f}"
        lines.append(f"{target.name:66}{shown}")
    return "\n".join(lines) + "\n"
