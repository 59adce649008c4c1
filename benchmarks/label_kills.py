"""Kills the label page and its engine again and again while a person chooses: is anything lost or doubled?

    python -m benchmarks.label_kills --kills 100

The person speaks to the page as its scripts do: reads the round, answers, has second thoughts now and then, trains.
What was acknowledged is written down. Page or engine, twice as often the page, are ended by SIGKILL at random moments,
between clicks and during them, and started again. Then: every acknowledged answer is in the store once and as it was
given, no answer that was taken back counts, nothing is there that nobody gave, every round that was trained on made one
epoch, and taking an answer of a trained round back is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks import RESULTS
from benchmarks.serve_kills import DURING_START, SETTINGS, Server, free_port
from fdfo_engine.bench.record import header, write
from fdfo_engine.choices.store import read_choices
from fdfo_engine.label.access import Passes, Session
from fdfo_engine.runtime.process import is_alive

ROUND_SIZE = 12
PATIENCE_S = 600.0
UNDO_SHARE = 0.2
Key = tuple[str, int, bool]
"""Round, pair, and whether it was shown again."""


def main() -> None:
    """Runs, checks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="ends earlier where so many kills take longer")
    parser.add_argument("--mean-s", type=float, default=2.0, help="of the time between a start and the next kill")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability" / "label_kills.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="label-kills-") as name:
        result = header("python -m benchmarks.label_kills", sys.argv[1:]) | {"seed": arguments.seed}
        result |= killed(Path(name) / "run", arguments)
    print(json.dumps(result, indent=1))
    write(arguments.out, result)
    sys.exit(1 if result["failures"] else 0)


def killed(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A person chooses while page and engine are killed; what was counted, and what does not hold."""
    chance = random.Random(arguments.seed)
    settings = (*SETTINGS, f"labels.round_size={ROUND_SIZE}", "labels.keep.of=1", "labels.strip=1")
    with Server(folder, 1, settings) as engine, PageProcess(folder) as page:
        engine.start()
        page.start()
        person = Person(page)
        person.start()
        started, kills = time.monotonic(), Counter[str]()
        end = started + 60 * arguments.minutes
        while sum(kills.values()) < arguments.kills and person.is_alive() and time.monotonic() < end:
            victim = chance.choice(["page", "page", "engine"])
            if victim == "page":
                if chance.random() >= DURING_START:
                    page.wait_until_up()
                    time.sleep(chance.expovariate(1 / arguments.mean_s))
                page.kill()
                page.start()
            else:
                if chance.random() >= DURING_START:
                    wait_until_ready(engine)
                    time.sleep(chance.expovariate(1 / arguments.mean_s))
                engine.kill(0)
                engine.start()
            kills[victim] += 1
        wait_until_ready(engine)
        person.finish()
        seconds = time.monotonic() - started
    found = failures(folder, person)
    return {
        "kills": sum(kills.values()), "kills_of_page": kills["page"], "kills_of_engine": kills["engine"],
        "seconds": round(seconds, 1), "rounds_trained": len(person.trained), "answers": len(person.ledger),
        "undone": person.undone, "presses_that_failed": person.failed, "failures": found,
    }  # fmt: skip


def _wait_until_answers(url: str) -> None:
    """Until `url` answers with success, or ten minutes."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):  # not up yet
            if httpx.get(url).is_success:
                return
        time.sleep(0.1)


def wait_until_ready(engine: Server) -> None:
    """Until its model is loaded."""
    _wait_until_answers(f"http://127.0.0.1:{engine.port}/readyz")


def failures(folder: Path, person: Person) -> list[str]:
    """What does not hold."""
    found = list(person.errors)
    kept: dict[Key, list[str]] = {}
    for judged in read_choices(folder):
        choice = judged.choice
        if not choice.is_withdrawn:
            kept.setdefault((choice.round, choice.pair, choice.is_repeat), []).append(choice.choice)
    if doubled := [key for key, choices in kept.items() if len(choices) > 1]:
        found.append(f"answers that are there twice: {doubled}")
    stored = {key: choices[-1] for key, choices in kept.items()}
    for key in person.ledger.keys() | stored.keys():
        if person.ledger.get(key) != stored.get(key):
            found.append(f"{key}: {person.ledger.get(key)} was acknowledged, {stored.get(key)} is there")
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if epochs != list(range(1, len(person.trained) + 1)):
        found.append(f"epochs {epochs} of {len(person.trained)} rounds that were trained on")
    return found


class PageProcess:
    """`fdfo label --run` in processes that are forked off one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.pid = folder, free_port(), 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> PageProcess:
        command = [sys.executable, "-c", _NURSERY, str(self.folder), str(self.port)]
        self._nursery = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._nursery.stdout is not None
        assert self._nursery.stdout.readline() == "ready\n"
        return self

    def start(self) -> None:
        """Starts a page."""
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write("start\n")
        self._nursery.stdin.flush()
        self.pid = int(self._nursery.stdout.readline())

    def wait_until_up(self) -> None:
        """Until it answers, or ten minutes."""
        _wait_until_answers(f"{self.url}/")

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        while is_alive(self.pid):
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        if is_alive(self.pid):
            self.kill()
        self._nursery.kill()
        self._nursery.communicate()  # closes its pipes


_NURSERY = """
import os, signal, sys
from pathlib import Path
folder, port = sys.argv[1:]
import uvicorn, jinja2, uvicorn.protocols.http.auto, uvicorn.lifespan.on
from fdfo_engine.label.server import PageDoor, open_page
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        out = os.open(folder + "/page.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        open_page(Path(folder), PageDoor(port=int(port), opens_browser=False))
        os._exit(0)
    print(pid, flush=True)
"""


class Person(threading.Thread):
    """Answers round after round; presses again what was not acknowledged.

    Attributes:
        ledger: what was acknowledged and not taken back. trained: rounds that were trained on. undone: answers taken
            back. failed: presses without an acknowledgement. errors: what went wrong for good.
    """

    def __init__(self, page: PageProcess) -> None:
        super().__init__(daemon=True)
        self._page = page
        self._chance = random.Random(1)
        self._is_ending = threading.Event()
        self.ledger: dict[Key, str] = {}
        self.trained: list[str] = []
        self.undone = self.failed = 0
        self.errors: list[str] = []

    def run(self) -> None:
        """Until it is told to finish; then to the end of the round."""
        try:
            with httpx.Client(timeout=60.0) as self._http:
                self._headers = {"Sec-Fetch-Site": "same-origin", "Cookie": self._cookie()}
                while not self._is_ending.is_set():
                    self._round()
                self._undo_too_late()
        except Exception as error:  # noqa: BLE001 - a failure of the harness's subject
            self.errors.append(f"person: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Waits for the end of the round."""
        self._is_ending.set()
        self.join(PATIENCE_S)
        if self.is_alive():
            self.errors.append("person: the last round did not end")

    def _cookie(self) -> str:
        path = self._page.folder / "serve.token"
        self._until(lambda: path.is_file() and len(path.read_text()) > 16)
        passes = Passes(path.read_text().strip())
        return f"{passes.cookie}={passes.word(Session('ann', 'owner'))}"

    def _round(self) -> None:
        """One round: answers, changes of mind, training."""
        name = self._until(lambda: self._read("round")["round"])
        while (told := self._read("round"))["due"] or told[
            "round"
        ] != name:  # a page that has just begun knows no round
            if told["round"] == name:
                self._answer(name, told["due"][0])
        self._until(lambda: self._is_trained(name))
        self.trained.append(name)

    def _due(self, name: str) -> list[dict[str, Any]]:
        """What waits for an answer; a page that has just begun knows no round yet."""
        due: list[dict[str, Any]] = self._until(lambda: (told := self._read("round"))["round"] == name and told)["due"]
        return due

    def _answer(self, name: str, pair: dict[str, Any]) -> None:
        choice = self._chance.choice(["left", "right", "tie", "skip"])
        body = {"round": name, "pair_id": pair["pair_id"], "repeat": pair["repeat"], "attempt": pair["attempt"]}
        event = self._until(lambda: self._post("label", body | {"choice": choice, "ms": 700}))["event"]
        key = (name, pair["pair_id"], pair["repeat"])
        self.ledger[key] = choice
        if self._chance.random() < UNDO_SHARE:
            self._until(lambda: self._post("undo", {"round": name, "event": event}))
            del self.ledger[key]
            self.undone += 1

    def _is_trained(self, name: str) -> bool:
        """Asks for training until the round is no longer open, then waits for its end."""
        now = self._read("state")["round"]
        if now is not None and now["id"] == name and now["state"] == "open":
            self._post("train", {"round": name})
        return now is not None and now["id"] != name

    def _undo_too_late(self) -> None:
        """A trained round's answers stay."""
        name = self.trained[-1]
        event = max(each.choice.event for each in read_choices(self._page.folder) if each.choice.round == name)
        answer = self._until(lambda: self._asked("POST", "undo", {"round": name, "event": event}))
        if answer.status_code != 409 or "cannot change any more" not in answer.json()["detail"]:
            self.errors.append(f"undo of a trained round: {answer.status_code} {answer.text}")

    def _read(self, name: str) -> Any:
        answer = self._until(lambda: self._asked("GET", name))
        return answer.json()

    def _post(self, name: str, body: dict[str, Any]) -> Any:
        """The acknowledgement; None where there was none."""
        answer = self._asked("POST", name, body)
        if answer is None:
            self.failed += 1
            return None
        answer.raise_for_status()
        return answer.json() or True

    def _asked(self, method: str, name: str, body: dict[str, Any] | None = None) -> httpx.Response | None:
        """An answer of page and engine; None while one of them is away."""
        try:
            answer = self._http.request(method, f"{self._page.url}/api/{name}", json=body, headers=self._headers)
        except httpx.TransportError:
            return None
        return None if answer.status_code == 503 else answer

    def _until(self, ask: Callable[[], Any]) -> Any:
        """What `ask` gives once it is something."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := ask()):
            if time.monotonic() > deadline:
                raise TimeoutError("nothing answered")
            time.sleep(0.1)
        return found


if __name__ == "__main__":
    main()
