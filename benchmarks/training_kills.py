"""Kills a training run again and again, and holds what is left against a run that nobody killed.

One rank of one, or of two, is ended by SIGKILL: half of the times while a checkpoint is being written, half at a random
moment. The run is started again with the same command. After each kill the newest checkpoint must load, and none that
was told of may be gone; in the end weights, moments, average and the log of epochs must be those of the other run.
`planted="tells_early"` is a run that tells of a checkpoint before it is committed, which must be found out.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from benchmarks.nursery import Nursery, Ranks, status_of
from benchmarks.serve_kills import SETTINGS
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.lost_checkpoints import last_saved
from fdfo_engine.runtime.run_folder import METRICS_NAME, checkpoint_store, read_log

PATIENCE_S = 120.0
MEAN_S = 3.0
"""Of the time from the first sign of training to a kill at a random moment."""

COMPARED = ("epoch", "first_pair", "pairs", "reward_mean", "reward_std", "grad_norm")
TRAINED = (*SETTINGS, "checkpoint.every=1")


def training_kills(nursery: Nursery, base: Path, *, ranks: int, kills: int, seed: int) -> dict[str, Any]:
    """Counts of one run that is killed `kills` times, and what does not hold."""
    chance, began = random.Random(seed), time.monotonic()
    folder = base / f"killed_{ranks}"
    found: list[str] = []
    during_saves = sum(
        killed_once(nursery, folder, ranks, chance, found, during_save=kill % 2 == 0) for kill in range(kills)
    )
    epochs = newest_epoch(folder) + 2
    for name in (folder, base / f"whole_{ranks}"):
        found += finished(nursery, name, ranks, epochs)
    found += differences(folder, base / f"whole_{ranks}")
    return {
        "ranks": ranks, "kills": kills, "kills_during_saves": during_saves, "epochs": epochs,
        "seconds": round(time.monotonic() - began, 1), "failures": found,
    }  # fmt: skip


def planted_failures(nursery: Nursery, base: Path, *, most: int) -> dict[str, Any]:
    """How many kills it takes until the run that tells too early is found out; None of `most` would be a failure."""
    chance, found, kills = random.Random(0), list[str](), 0
    while not found and kills < most:
        killed_once(nursery, base / "planted", 1, chance, found, during_save=True, planted="tells_early")
        kills += 1
    return {"planted": "tells of a checkpoint before it is committed", "kills": kills, "found": found}


def killed_once(
    nursery: Nursery, folder: Path, ranks: int, chance: random.Random, found: list[str], *, during_save: bool,
    planted: str = "",
) -> bool:  # fmt: skip
    """Starts the run and kills a rank of it; adds to `found` what is lost. Whether a checkpoint was being written."""
    run = start(nursery, folder, ranks, "run.epochs=100000", PLANTED=planted)
    wait_until_training(run, folder)
    if during_save:
        wait_for_save(folder, run)
    else:
        time.sleep(chance.expovariate(1 / MEAN_S))
    run.kill(chance.randrange(ranks))
    is_amid_save = is_saving(folder, run)
    run.wait(20.0)
    found += lost(folder / "run")
    return is_amid_save


def lost(run_dir: Path) -> list[str]:
    """Whether a checkpoint that was told of is gone, or none can be loaded."""
    told = last_saved(run_dir)
    try:
        newest = checkpoint_store(run_dir).load()
    except CheckpointError as error:
        return [f"unloadable: {error}"]
    if told is not None and (newest is None or newest.name < told):
        return [f"{told} was told of, and {newest.name if newest else 'nothing'} is there"]
    return []


def finished(nursery: Nursery, folder: Path, ranks: int, epochs: int) -> list[str]:
    """Lets the run go to its end."""
    run = start(nursery, folder, ranks, f"run.epochs={epochs}")
    codes = run.wait(PATIENCE_S + epochs * 5)
    return [] if codes == [0] * ranks else [f"{folder.name}: exit codes {codes}: {run.log()[-600:]}"]


def differences(killed: Path, whole: Path) -> list[str]:
    """What is not as in the run without kills: bits of the checkpoints, lines of the log."""
    found = []
    logs = [read_log(folder / "run" / METRICS_NAME) for folder in (killed, whole)]
    lines = [[{key: line.get(key) for key in COMPARED} for line in log] for log in logs]
    if lines[0] != lines[1]:
        found.append("the logs of epochs differ")
    files = [sorted((folder / "run/checkpoints").glob("epoch_*/*.safetensors")) for folder in (killed, whole)]
    names = [[f"{path.parent.name}/{path.name}" for path in paths] for paths in files]
    if names[0] != names[1] or not names[0]:
        return [*found, f"other checkpoints: {names}"]
    pairs = zip(*files, strict=True)
    return found + [f"{a.parent.name}/{a.name} has other bits" for a, b in pairs if a.read_bytes() != b.read_bytes()]


def start(nursery: Nursery, folder: Path, ranks: int, *overrides: str, **variables: str) -> Ranks:
    """The run in `folder` on the bundled miniature."""
    return nursery.start(
        folder, "shapes", f"run.dir={folder / 'run'}", *TRAINED, *overrides, ranks=ranks, **variables
    )  # fmt: skip


def newest_epoch(folder: Path) -> int:
    """Of the newest checkpoint; 0 without one."""
    state = checkpoint_store(folder / "run").newest_state()
    return 0 if state is None else int(state["epoch"])


def wait_until_training(run: Ranks, folder: Path) -> None:
    """Until this process has written an epoch to the log, or is gone."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and run.is_running():
        status = status_of(folder / "run")
        if status.get("pid") == run.pids[0] and status.get("phase") in ("rollout", "reward", "update"):
            return
        time.sleep(0.02)


def wait_for_save(folder: Path, run: Ranks) -> None:
    """Until a checkpoint begins to be written."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and run.is_running() and not is_saving(folder, run):
        time.sleep(0.0005)


def is_saving(folder: Path, run: Ranks) -> bool:
    """Whether rank 0 is writing a checkpoint; what a killed one left has another number."""
    return any((folder / "run/checkpoints").glob(f".tmp-*-{run.pids[0]}"))
