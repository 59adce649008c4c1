"""A real server on the shapes model, in a thread of the test's process or in a process of its own."""

import json
import os
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager
from pathlib import Path

from engine.launching import environment

from fdfo_engine import load_config
from fdfo_engine.client import Client
from fdfo_engine.runtime.errors import Stopped
from fdfo_engine.runtime.stop import StopRequest
from fdfo_engine.serve.address import ADDRESS_NAME
from fdfo_engine.serve.server import Door, serve

SETTINGS = (
    "sampling.pairs_per_epoch=4", "sampling.block_pairs=2", "sampling.steps=4", "update.train_steps=4",
    "update.micro_batch=8", "evaluation.every=0", "log.tensorboard=false", "log.images_every=0", "run.epochs=3",
)  # fmt: skip


def settings(folder, *more):
    return [f"run.dir={folder}", *SETTINGS, *more]


def shapes_config(folder, *more):
    return load_config("shapes", settings(folder, *more))


@contextmanager
def served(config, **door):
    """A client of a server in a thread; the server is stopped as by a signal."""
    stop, failures = StopRequest(), []

    def run():
        try:
            serve(config, Door(port=0, **door), stop)
        except Stopped:
            pass
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=run, name="engine")
    thread.start()
    try:
        with waited_for(Path(config.run.dir), lambda: thread.is_alive()) as client:
            yield client
    finally:
        stop.reason = "the test is over"
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


@contextmanager
def waited_for(folder, is_alive=lambda: True, timeout_s=120):
    """A client of the server of `folder`, once its engine is loaded."""
    deadline = time.monotonic() + timeout_s
    while not (folder / ADDRESS_NAME).is_file():
        assert is_alive(), "the server ended"
        assert time.monotonic() < deadline, "no server"
        time.sleep(0.02)
    with Client.of_run(folder, patience_s=timeout_s) as client:
        client.ready()
        yield client


def start_process(folder, *more, ranks=1, log=None):
    """`fdfo serve` in a process of its own, on any port."""
    command = [sys.executable, "-m", "fdfo_engine.cli.main", "serve", "--config", "shapes", "--port", "0"]
    if ranks > 1:
        command += ["--ranks", str(ranks)]
    output = os.devnull if log is None else log
    with open(output, "ab") as file:
        return subprocess.Popen(
            [*command, *settings(folder, *more)], stdout=file, stderr=file, env=environment(FDFO_CHOSEN_PORT="")
        )


def told(stream):
    """What the HTTP side needs of a `Talk`."""
    return types.SimpleNamespace(stream=stream, phase=None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
