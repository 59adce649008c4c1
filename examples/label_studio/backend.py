"""Label Studio's ML backend protocol over a served run: people choose in Label Studio, the engine trains on it.

    python examples/label_studio/backend.py --run runs/shapes --label-studio http://localhost:8080 --project 1
    (LABEL_STUDIO_TOKEN holds an access token; the project's labelling interface is labels.xml beside this file)

It samples a round, imports its pairs as tasks, and takes Label Studio's webhooks: an annotation is an opinion, a
changed one replaces it, a deleted one is taken back, START_TRAINING trains and imports the next round.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

import httpx

from fdfo_engine.client import Client

CHOICES = {"left": "left", "right": "right", "tie": "tie"}
RATER = "label_studio"


class Bridge:
    """The served run on one side, a Label Studio project on the other."""

    def __init__(self, client: Client, studio: httpx.Client, project: int, count: int) -> None:
        self._client, self._studio, self._project, self._count = client, studio, project, count
        self._events: dict[int, int] = {}  # of each annotation
        self._lock = Lock()
        self.round: str | None = None

    def import_round(self) -> str:
        """Samples a round and imports its pairs as tasks; images travel inside them, since the server is private."""
        self.round = self._client.create_round(count=self._count)["round"]
        tasks = [
            {
                "data": {
                    "prompt": pair["prompt"],
                    "left": self._data_url(pair["left"]),
                    "right": self._data_url(pair["right"]),
                    "pair_id": pair["pair_id"],
                    "round": self.round,
                }
            }
            for pair in self._client.pairs(self.round, rater=RATER)
        ]
        self._studio.post(f"/api/projects/{self._project}/import", json=tasks).raise_for_status()
        return self.round

    def _data_url(self, image: str) -> str:
        return "data:image/png;base64," + base64.b64encode(self._client.image(image)).decode()

    def webhook(self, action: str, body: dict) -> dict:
        """What Label Studio tells."""
        with self._lock:
            if action in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED"):
                return self._record(body["annotation"], body["task"]["data"])
            if action in ("ANNOTATION_DELETED", "ANNOTATIONS_DELETED"):
                return self._withdraw(body)
            if action == "START_TRAINING":
                assert self.round is not None
                trained = self._client.train(self.round)
                return {"checkpoint": trained["checkpoint"], "next_round": self.import_round()}
        return {"ignored": action}

    def _record(self, annotation: dict, data: dict) -> dict:
        picked = [r["value"]["selected"] for r in annotation["result"] if r.get("type") == "pairwise"]
        picked += [r["value"]["choices"][0] for r in annotation["result"] if r.get("type") == "choices"]
        choice = CHOICES[picked[0]] if picked else "skip"
        judgement = {"pair_id": data["pair_id"], "choice": choice, "ms": int(1000 * (annotation.get("lead_time") or 0))}
        (event,) = self._client.feedback(data["round"], [judgement], rater=RATER)
        self._events[annotation["id"]] = event
        return {"event": event}

    def _withdraw(self, body: dict) -> dict:
        gone = body.get("annotations") or [body["annotation"]]
        events = [self._events.pop(a["id"]) for a in gone if a["id"] in self._events]
        assert self.round is not None
        for event in events:
            self._client.withdraw(self.round, event)
        return {"withdrawn": events}

    def predict(self, tasks: list[dict]) -> list[dict]:
        """No guess: the run's own reward would only teach raters to agree with it."""
        version = self._client.run()["weights_version"]
        return [{"result": [], "score": 0.0, "model_version": f"fdfo-{version}"} for _ in tasks]


def handler_of(bridge: Bridge) -> type[BaseHTTPRequestHandler]:
    """The protocol's endpoints."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"status": "UP", "model_class": "fdfo"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            if self.path == "/setup":
                self._answer({"model_version": "fdfo"})
            elif self.path == "/predict":
                self._answer({"results": bridge.predict(body.get("tasks", []))})
            elif self.path == "/webhook":
                self._answer(bridge.webhook(body["action"], body), 201)
            else:
                self._answer({"error": "unknown"}, 404)

        def _answer(self, content: dict, status: int = 200) -> None:
            raw = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            """Silent."""

    return Handler


def main() -> None:
    """Imports a round and listens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the served run's folder")
    parser.add_argument("--label-studio", default="http://localhost:8080")
    parser.add_argument("--project", type=int, required=True)
    parser.add_argument("--count", type=int, default=48, help="pairs a round")
    parser.add_argument("--port", type=int, default=9090)
    arguments = parser.parse_args()
    headers = {"Authorization": f"Token {os.environ['LABEL_STUDIO_TOKEN']}"}
    studio = httpx.Client(base_url=arguments.label_studio, headers=headers, timeout=60)
    bridge = Bridge(Client.of_run(arguments.run), studio, arguments.project, arguments.count)
    print("round", bridge.import_round())  # noqa: T201
    ThreadingHTTPServer(("127.0.0.1", arguments.port), handler_of(bridge)).serve_forever()


if __name__ == "__main__":
    main()
