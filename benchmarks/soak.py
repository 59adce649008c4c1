"""A run of many short epochs, looked at from outside: memory, open files, threads, disk and the event log stay flat.

The second quarter of the epochs is held against the last one; before it caches fill. `LEAKING` is a reward that keeps
a megabyte and a file at each call and starts a thread, which must be found out.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.nursery import Nursery
from benchmarks.serve_kills import SETTINGS
from fdfo_engine.runtime.event_log import EVENTS_NAME
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME

REST = ("evaluation.every=10", "evaluation.count=8", "checkpoint.every=3")
"""Of what a run does beside training, everything happens many times."""

MEMORY_MB = 8.0
"""Growth that an allocator's own ways explain: planted is a megabyte an epoch."""
GROWTH = 1.05
MOST_CHECKPOINTS = 4
"""Two that are kept, the best one, one that is being written."""

LEAKING = """
import threading, time
kept = []
def leaking(prompts, images):
    kept.append((bytearray(b"x") * (1 << 20), open(__file__)))
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    return images.mean((1, 2, 3))
"""


class Look(NamedTuple):
    """What a process holds after some epoch."""

    epoch: int
    memory_mb: float
    files: int
    threads: int
    disk_bytes: int
    """Of the run folder without logs and pictures, which grow with what they tell."""
    checkpoints: int
    """Folders of them, one that is being written too."""
    log_bytes: int


def soak(nursery: Nursery, base: Path, epochs: int, *, leaks: bool = False) -> dict[str, Any]:
    """Trains the shapes model for `epochs` short epochs; what grew, and what must not."""
    run_dir = base / "run"
    words = [*SETTINGS, *REST, f"run.epochs={epochs}", f"run.dir={run_dir}"]
    base.mkdir()
    if leaks:
        (base / "leaking.py").write_text(LEAKING)
        words.append(f"rewards.0.name={base / 'leaking.py'}:leaking")
    began = time.monotonic()
    ranks = nursery.start(base, "shapes", *words)
    looks = []
    while ranks.is_running():
        epoch = lines(run_dir / METRICS_NAME)
        if epoch and (not looks or epoch > looks[-1].epoch):
            looks += [look for look in [look_at(ranks.pids[0], run_dir, epoch)] if look is not None]
        time.sleep(0.02)
    assert ranks.wait(60) == [0], ranks.log()[-3000:]
    early = [look for look in looks if epochs // 4 <= look.epoch < epochs // 2]
    late = [look for look in looks if look.epoch >= epochs - epochs // 4]
    return {
        "epochs": epochs, "seconds": round(time.monotonic() - began, 1), "early": largest(early),
        "late": largest(late), "log_bytes_an_epoch": [log_rate(early), log_rate(late)],
        "failures": growth(early, late),
    }  # fmt: skip


def look_at(pid: int, run_dir: Path, epoch: int) -> Look | None:
    """What the process holds; None where it, or a file of its folder, went in that moment."""
    process = Path(f"/proc/{pid}")
    logs = {run_dir / name for name in (EVENTS_NAME, METRICS_NAME, EVALUATIONS_NAME)}
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        files = [Path(folder) / name for folder, _, names in os.walk(run_dir) for name in names]
        sizes = {file: file.stat().st_size for file in files if file.suffix not in (".png", ".jpg")}
        return Look(
            epoch=epoch,
            memory_mb=int(status["VmRSS"].split()[0]) / 1024,
            files=len(os.listdir(process / "fd")),
            threads=int(status["Threads"]),
            disk_bytes=sum(size for file, size in sizes.items() if file not in logs),
            checkpoints=len(os.listdir(run_dir / "checkpoints")),
            log_bytes=sum(size for file, size in sizes.items() if file in logs),
        )
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None


def growth(early: list[Look], late: list[Look]) -> list[str]:
    """What is not flat."""
    before, after = largest(early), largest(late)
    found = [f"{name}: {before[name]} before, {after[name]} after" for name in ("files", "threads")
             if after[name] > before[name]]  # fmt: skip
    if after["memory_mb"] > before["memory_mb"] + MEMORY_MB:
        found.append(f"memory: {before['memory_mb']:.1f} MB before, {after['memory_mb']:.1f} MB after")
    if after["checkpoints"] > MOST_CHECKPOINTS:
        found.append(f"checkpoints: {after['checkpoints']}")
    if per_checkpoint(after) > GROWTH * per_checkpoint(before):
        found.append(f"disk: {before['disk_bytes']} bytes before, {after['disk_bytes']} after")
    if log_rate(late) > GROWTH * log_rate(early):
        found.append(f"logs: {log_rate(early):.0f} bytes an epoch before, {log_rate(late):.0f} after")
    return found


def largest(looks: list[Look]) -> dict[str, float]:
    """Of each quantity but the logs'."""
    names = ("memory_mb", "files", "threads", "disk_bytes", "checkpoints")
    return {name: max(getattr(look, name) for look in looks) for name in names}


def per_checkpoint(most: dict[str, float]) -> float:
    """Bytes: how many of them there are changes with which was best."""
    return most["disk_bytes"] / max(most["checkpoints"], 1)


def log_rate(looks: list[Look]) -> float:
    """Bytes that the logs grow by an epoch."""
    return (looks[-1].log_bytes - looks[0].log_bytes) / max(looks[-1].epoch - looks[0].epoch, 1)


def lines(path: Path) -> int:
    """Of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
