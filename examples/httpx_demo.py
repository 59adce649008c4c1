"""The shapes demo from outside: plain httpx, no code of the engine, down to an exported pipeline that diffusers loads.

fdfo serve shapes run.dir=runs/http          (in another terminal)
python examples/httpx_demo.py runs/http --epochs 45 --out exported/
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

import httpx


class Server:
    """What the demo needs of the protocol."""

    def __init__(self, run_dir: Path) -> None:
        address = json.loads((run_dir / "serve.json").read_text())
        token = (run_dir / "serve.token").read_text().strip()
        self.http = httpx.Client(base_url=address["url"], headers={"Authorization": f"Bearer {token}"}, timeout=120)
        self.seq = self.get("/v1/capabilities")["expected_seq"]

    def get(self, path: str, **query: Any) -> dict:
        """A JSON answer."""
        response = self.http.get(path, params=query)
        response.raise_for_status()
        answer: dict = response.json()
        return answer

    def operation(self, path: str, body: dict) -> dict:
        """Queues work and waits for its result."""
        response = self.http.post(path, json=body, headers={"Idempotency-Key": uuid.uuid4().hex})
        response.raise_for_status()
        operation = response.json()
        while operation["state"] not in ("done", "failed"):
            operation = self.get(f"/v1/operations/{operation['id']}", wait=30)
        if operation["state"] == "failed":
            raise RuntimeError(operation["problem"]["detail"])
        result: dict = operation["result"]
        return result

    def primitive(self, kind: str, **body: Any) -> dict:
        """The next primitive."""
        result = self.operation(f"/v1/{kind}", {"seq": self.seq, **body})
        self.seq += 1
        return result


def train(server: Server, epochs: int) -> list[float]:
    """The paper's loop on the run's own reward; the mean reward of each epoch."""
    parts, means = server.get("/v1/capabilities")["parts"], []
    for _ in range(epochs):
        name = server.primitive("sample")["round"]
        rewards = server.primitive("compute_reward", round=name)["rewards"]
        for part in range(parts):
            server.primitive("forward_backward", round=name, rewards=rewards, part=part)
            server.primitive("optim_step")
        snapshot = server.primitive("snapshot")
        known = [value for pair in rewards.values() for value in pair if value is not None]
        means.append(sum(known) / len(known))
        print(f"epoch {snapshot['epoch']}  reward {means[-1]:.4f}  {snapshot['checkpoint']}")  # noqa: T201
    return means


def fetch(server: Server, out: Path) -> None:
    """The export's files, over HTTP."""
    export = server.operation("/v1/run/export", {"style": "diffusers"})
    for file in export["files"]:
        path = out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(server.http.get(f"/v1/run/exports/{export['operation']}/{file}").raise_for_status().content)


def main() -> None:
    """Trains, exports, fetches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the served run's folder")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    server = Server(arguments.run)
    train(server, arguments.epochs)
    fetch(server, arguments.out)
    print(f"exported to {arguments.out}")  # noqa: T201


if __name__ == "__main__":
    main()
