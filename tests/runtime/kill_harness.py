"""Kills a process that saves checkpoints back to back, again and again, and counts what is then lost.

    python tests/runtime/kill_harness.py FOLDER KILLS {store,naive}

Prints JSON: kills, saves, unloadable (nothing usable is left), torn (files of different saves), lost (a save that was
acknowledged is gone). A child is forked for each kill, so that torch is imported once.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fdfo_engine.runtime.checkpoint import CheckpointStore
from fdfo_engine.runtime.errors import CheckpointError

FILES = ("weights", "optimizer")


class NaiveStore:
    """What the harness must catch: files overwritten in place."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)

    def save(self, name, tensors, state):
        for stem, group in tensors.items():
            save_file(group, self.folder / f"{stem}.safetensors")
        (self.folder / "state.json").write_text(json.dumps(state))

    def load(self):
        if not (self.folder / "state.json").exists():
            return None
        tensors = {stem: load_file(self.folder / f"{stem}.safetensors") for stem in FILES}
        return tensors, json.loads((self.folder / "state.json").read_text())


def loaded(store):
    checkpoint = store.load()
    return (checkpoint.tensors, checkpoint.state) if isinstance(store, CheckpointStore) and checkpoint else checkpoint


def save_forever(store, epoch, acknowledge):
    while True:
        tensors = {stem: {"x": torch.full((60_000,), float(epoch))} for stem in FILES}
        store.save(f"epoch_{epoch:06d}", tensors, {"epoch": epoch, "filler": "x" * 2000})
        os.write(acknowledge, f"{epoch}\n".encode())
        epoch += 1


def one_kill(make, epoch, delay_s):
    """Epochs acknowledged by a child that was killed `delay_s` after its start."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(make(), epoch, writer)
    os.close(writer)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return [int(line) for line in pipe.read().split()]


def seconds_of_a_save(make):
    """As this machine is busy now: kills must fall among saves, not before the first."""
    started = time.monotonic()
    child_epochs = 0
    while child_epochs == 0:
        child_epochs = len(one_kill(make, 0, time.monotonic() - started + 0.01))
    return time.monotonic() - started


def run(folder, kills, kind):
    random.seed(0)
    make = (lambda: CheckpointStore(folder)) if kind == "store" else (lambda: NaiveStore(folder))
    longest_s = max(0.08, 4 * seconds_of_a_save(lambda: type(make())(f"{folder}-timed")))
    counts = {"kills": kills, "saves": 0, "unloadable": 0, "torn": 0, "lost": 0}
    newest = -1
    for _ in range(kills):
        acknowledged = one_kill(make, newest + 1, random.uniform(0.0, longest_s))
        counts["saves"] += len(acknowledged)
        newest = max([newest, *acknowledged])
        try:
            found = loaded(make())
        except (CheckpointError, SafetensorError, OSError, ValueError):
            counts["unloadable"] += 1
            continue
        if found is None:
            counts["lost"] += newest >= 0
            continue
        tensors, state = found
        counts["torn"] += any(not bool((tensors[stem]["x"] == state["epoch"]).all()) for stem in FILES)
        counts["lost"] += state["epoch"] < newest
        newest = max(newest, state["epoch"])
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(run(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
