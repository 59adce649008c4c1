"""`fdfo report`: a run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fdfo_engine.cli.options import add_run_dir


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "report",
        help="write a run's curves, pictures and settings to one HTML page",
        description="Writes one HTML page about a run, running or done; it opens offline. Prints the evaluations' "
        "first and last figures.",
    )
    add_run_dir(parse)
    parse.add_argument("--out", type=Path, help="the file to write; default: RUN_DIR/report.html")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the page; prints its path and before/after figures."""
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.terminal import importing

    with importing():
        from fdfo_engine.report import write_report
        from fdfo_engine.report.run_data import read_run

    page = write_report(arguments.run_dir, arguments.out)
    for line in before_after(read_run(arguments.run_dir).evaluations):
        say(line)
    say(f"report: {page}")
    return 0


def before_after(evaluations: list[dict[str, Any]]) -> list[str]:
    """A line for each metric: at the first evaluation and at the last, with standard errors and the difference."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    lines = []
    for name in [name for name in last["metrics"] if name in first["metrics"]]:
        before, after = first["metrics"][name], last["metrics"][name]
        change = f" ({after - before:+.4f})" if None not in (before, after) else ""
        span = f"epoch {first['epoch']} -> {last['epoch']}, {last.get('count', 0)} images"
        lines.append(f"{name}: {_figure(first, name)} -> {_figure(last, name)}{change}  [{span}]")
    return lines


def _figure(evaluation: dict[str, Any], name: str) -> str:
    value, error = evaluation["metrics"][name], (evaluation.get("metrics_stderr") or {}).get(name)
    return "none" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
