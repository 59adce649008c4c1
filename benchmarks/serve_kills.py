"""Kills a served run again and again, and holds what is left against a run that nobody killed.

    python -m benchmarks.serve_kills --kills 200
    python -m benchmarks.serve_kills --kills 40 --ranks 2

One client trains by primitives and by feedback in turn, another follows the events. The server, or one of its ranks, is
ended by SIGKILL at random moments, during requests and between them, and started again. Then: every operation that
was acknowledged is there once, so is every opinion, the follower saw each event once, and weights, moments and average
have the bits of the run without kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import RESULTS
from fdfo_engine.bench.record import header, write
from fdfo_engine.client import Client
from fdfo_engine.runtime.process import is_alive

SETTINGS = (
    "sampling.pairs_per_epoch=4", "sampling.block_pairs=2", "sampling.steps=4", "update.train_steps=4",
    "update.micro_batch=8", "evaluation.every=0", "log.tensorboard=false", "log.images_every=0", "run.epochs=100000",
)  # fmt: skip
PATIENCE_S = 300.0
DURING_START = 0.1
"""Share of kills that do not wait until the server answers."""
COMPARED = {"operations": "kind, body, state, result", "feedback": "pair, rater, reward_0, reward_1"}


def main() -> None:
    """Runs both, compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-s", type=float, default=2.0, help="of the time that it serves before a kill")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-kills-") as name:
        killed = killed_run(Path(name) / "killed", arguments)
        whole = whole_run(Path(name) / "whole", arguments, killed["epochs"])
        result = header("python -m benchmarks.serve_kills", sys.argv[1:]) | {
            "ranks": arguments.ranks,
            "seed": arguments.seed,
        }
        result |= killed | {"failures": failures(Path(name), killed, whole)}
    result.pop("acknowledged")
    print(json.dumps(result, indent=1))
    suffix = f"_{arguments.ranks}_ranks" if arguments.ranks > 1 else ""
    write(arguments.out or RESULTS / "reliability" / f"serve_kills{suffix}.json", result)
    sys.exit(1 if result["failures"] else 0)


def killed_run(folder: Path, arguments: argparse.Namespace) -> dict:
    """Trains while the server is killed; what the clients saw."""
    chance = random.Random(arguments.seed)
    with Server(folder, arguments.ranks) as server:
        trainer, follower = Trainer(server), Follower(server)
        trainer.start()
        follower.start()
        kills, serving = 0, 0
        started = time.monotonic()
        while kills < arguments.kills:
            server.start()
            if chance.random() >= DURING_START:
                server.wait_until_up()
            time.sleep(chance.expovariate(1 / arguments.mean_s))
            serving += server.is_up()
            server.kill(chance.randrange(arguments.ranks))
            kills += 1
        server.start()
        trainer.finish()
        follower.finish(events_of(folder))
    return {
        "kills": kills,
        "kills_while_serving": serving,
        "seconds": time.monotonic() - started,
        "epochs": trainer.epochs,
        "requests": len(trainer.acknowledged),
        "acknowledged": trainer.acknowledged,
        "events_seen": follower.seen,
    } | {"errors_of_clients": trainer.errors + follower.errors}  # fmt: skip


def whole_run(folder: Path, arguments: argparse.Namespace, epochs: int) -> dict:
    """As many epochs without a kill."""
    with Server(folder, arguments.ranks) as server:
        server.start()
        trainer = Trainer(server, epochs=epochs)
        trainer.start()
        trainer.finish()
    return {"acknowledged": trainer.acknowledged, "errors": trainer.errors}


def failures(base: Path, killed: dict, whole: dict) -> list[str]:
    """What does not hold."""
    found = [*killed["errors_of_clients"], *whole["errors"]]
    seen = killed.pop("events_seen")
    numbers = [event["seq"] for event in seen]
    if numbers != list(range(1, len(numbers) + 1)):
        found.append("the follower missed an event, or saw one twice")
    if [event["seq"] for event in events_of(base / "killed")][: len(numbers)] != numbers:
        found.append("events.jsonl is not what the follower saw")
    if killed["acknowledged"] != whole["acknowledged"]:
        found.append("the answers differ from those of the run without kills")
    for table, columns in COMPARED.items():
        one, other = (rows(base / name, table, columns) for name in ("killed", "whole"))
        if one != other:
            found.append(f"{table}: {len(one)} rows with kills and {len(other)} without, or other ones")
    one, other = (sorted((base / name / "checkpoints").glob("epoch_*/*.safetensors")) for name in ("killed", "whole"))
    if [p.relative_to(base / "killed") for p in one] != [p.relative_to(base / "whole") for p in other] or not one:
        found.append("other checkpoints")
    for a, b in zip(one, other, strict=False):
        if a.read_bytes() != b.read_bytes():
            found.append(f"{a.parent.name}/{a.name} has other bits")
    return found


def rows(folder: Path, table: str, columns: str) -> list[tuple]:
    """A table of the run's store; seconds, which no two runs share, left out of the results."""
    with sqlite3.connect(folder / "serve.sqlite") as db:
        found = db.execute(
            f"SELECT {columns} FROM {table} ORDER BY 1, 2, 3"
            if table == "feedback"
            else f"SELECT {columns} FROM {table} ORDER BY id"
        ).fetchall()
    return [tuple(without_seconds(cell) for cell in row) for row in found]


def without_seconds(cell):
    """JSON without the time that an update took, and image ids, which a run's own secret makes."""
    if not isinstance(cell, str) or not cell.startswith("{"):
        return cell
    tree = json.loads(cell)
    tree.get("metrics", {}).pop("seconds_update", None)
    for pair in tree.get("pairs", []):
        pair.pop("images", None)
    return json.dumps(tree, sort_keys=True)


def events_of(folder: Path) -> list[dict]:
    """Whole lines of events.jsonl."""
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Server:
    """A served run whose processes are forked off one that has imported everything: a start takes a second."""

    def __init__(self, folder: Path, ranks: int, settings: Sequence[str] = SETTINGS) -> None:
        self.folder, self.ranks, self.settings = folder, ranks, settings
        folder.mkdir()
        self.port = free_port()
        self.pids: list[int] = []

    def __enter__(self) -> Server:
        command = [sys.executable, "-c", _NURSERY, str(self.folder), str(self.port), str(self.ranks), *self.settings]
        self._nursery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._nursery.stdout is not None
        while self._nursery.stdout.readline() != "ready\n":  # libraries print, too
            assert self._nursery.poll() is None
        return self

    def start(self) -> None:
        """Starts every rank."""
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(f"{free_port()}\n")
        self._nursery.stdin.flush()
        self.pids = json.loads(self._nursery.stdout.readline())

    def is_up(self) -> bool:
        """Whether it takes connections."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def wait_until_up(self) -> None:
        """Until it takes connections, or five minutes."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_up() and time.monotonic() < deadline:
            time.sleep(0.05)

    def kill(self, rank: int) -> None:
        """SIGKILL of one rank; the others are given a moment to notice, and then ended too."""
        os.kill(self.pids[rank], signal.SIGKILL)
        for pid in self.pids:
            wait_until_gone(pid, 2.0)

    def __exit__(self, *_: object) -> None:
        for pid in self.pids:
            wait_until_gone(pid, 0.0)
        self._nursery.kill()
        self._nursery.communicate()  # closes its pipes


_NURSERY = """
import json, os, sys, signal
folder, port, ranks, *settings = sys.argv[1:]
import torch, deepspeed, diffusers, uvicorn
torch.set_num_threads(1)
from fdfo_engine import load_config
from fdfo_engine.serve.server import Door, serve
from fdfo_engine.runtime.process import end_process
from fdfo_engine.runtime.errors import report_and_exit_code
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    pids = []
    for rank in range(int(ranks)):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": line.strip()}
            out = os.open(folder + "/server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            try:
                serve(load_config("shapes", [f"run.dir={folder}", *settings]), Door(port=int(port)))
                code = 0
            except BaseException as error:
                code = report_and_exit_code(error)
            end_process(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
"""


class Trainer(threading.Thread):
    """A client that trains: an epoch by primitives, the next by feedback, for ever or `epochs`."""

    def __init__(self, server: Server, epochs: int | None = None) -> None:
        super().__init__(daemon=True)
        self._server, self._wanted = server, epochs
        self._is_ending = threading.Event()
        self.epochs = 0
        self.acknowledged: list = []
        self.errors: list[str] = []

    def run(self) -> None:
        """Until it is told to finish; then to the end of a pair of epochs."""
        try:
            with waiting_client(self._server) as client:
                while self.epochs != self._wanted and not (self._wanted is None and self._is_ending.is_set()):
                    (self._by_primitives if self.epochs % 2 == 0 else self._by_feedback)(client)
                    self.epochs += 1
        except Exception as error:  # noqa: BLE001 - a failure of the harness's subject
            self.errors.append(f"trainer: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Waits for the end."""
        self._is_ending.set()
        self.join(PATIENCE_S + 600)

    def _by_primitives(self, client: Client) -> None:
        sampled = client.sample()
        rewards = {
            pair["pair_id"]: [score(client.image(image)) for image in pair["images"]] for pair in sampled["pairs"]
        }
        self._keep(rewards)
        for part in range(2):
            self._keep(client.forward_backward(sampled["round"], rewards=rewards, part=part))
            self._keep(client.optim_step())
        self._keep(client.snapshot())

    def _by_feedback(self, client: Client) -> None:
        sampled = client.create_round()
        name = sampled["round"]
        for pair in sampled["pairs"]:
            scores = {image: score(client.image(image)) for image in pair["images"]}
            (event,) = client.feedback(name, [{"pair_id": pair["pair_id"], "scores": scores}], rater="ann")
            if pair["pair_id"] % 3 == 0:  # changes its mind
                client.withdraw(name, event)
                swapped = dict(zip(scores, reversed(scores.values()), strict=True))
                client.feedback(name, [{"pair_id": pair["pair_id"], "scores": swapped}], rater="ann")
        answer = client.train(name)
        answer["metrics"].pop("seconds_update")
        self._keep(answer)

    def _keep(self, answer) -> None:
        self.acknowledged.append(answer)


class Follower(threading.Thread):
    """A client that follows the events over every restart."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.seen: list[dict] = []
        self.errors: list[str] = []

    def run(self) -> None:
        """For ever."""
        try:
            with waiting_client(self._server) as client:
                for event in client.events():
                    self.seen.append(event)
        except Exception as error:  # noqa: BLE001 - a failure of the harness's subject
            self.errors.append(f"follower: {type(error).__name__}: {error}")

    def finish(self, expected: list[dict]) -> None:
        """Waits until it has seen what there is."""
        deadline = time.monotonic() + 60
        while len(self.seen) < len(expected) and time.monotonic() < deadline:
            time.sleep(0.1)
        if len(self.seen) < len(expected):
            self.errors.append(f"follower: saw {len(self.seen)} of {len(expected)} events")


def waiting_client(server: Server) -> Client:
    """A client, once the token is there."""
    path = server.folder / "serve.token"
    while not path.is_file() or len(path.read_text()) < 16:
        time.sleep(0.05)
    return Client(f"http://127.0.0.1:{server.port}", path.read_text().strip(), patience_s=PATIENCE_S)


def score(png: bytes) -> float:
    """A number of a picture; which one does not matter."""
    return float(int.from_bytes(png[-40:-20], "big") % 1000)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_gone(pid: int, patience_s: float) -> None:
    """Gives a process `patience_s` to end by itself."""
    deadline = time.monotonic() + patience_s
    while is_alive(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
