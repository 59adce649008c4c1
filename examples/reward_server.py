"""A reward server for `rewards: [{name: "http://127.0.0.1:8700", weight: 1.0}]`: replace `score` by your own.

    python examples/reward_server.py --port 8700

Only the standard library and Pillow. The protocol is in the docstring of `fdfo_engine/rewards/http_reward.py`.
"""

import argparse
import base64
import contextlib
import io
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageStat

MAX_REQUEST_BYTES = 256 << 20


def score(prompt: str, image: Image.Image) -> float | None:
    """How bright the image is, 0..1; None would be no opinion."""
    del prompt
    return sum(ImageStat.Stat(image).mean) / (3 * 255)


def answer(request: dict) -> dict:
    """One score an item, under the item's own id."""
    scores = []
    for item in request["items"]:
        image = Image.open(io.BytesIO(base64.b64decode(item["image"]))).convert("RGB")
        scores.append({"id": item["id"], "score": score(item["prompt"], image)})
    return {"scores": scores}


class Handler(BaseHTTPRequestHandler):
    """POST with JSON, answered with JSON."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Scores the items of one request."""
        key = os.environ.get("FDFO_REWARD_KEY")
        length = int(self.headers.get("Content-Length", 0))
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.close_connection = True
            self._reply(401, {"error": "wrong key"})
        elif length > MAX_REQUEST_BYTES:
            self.close_connection = True
            self._reply(413, {"error": "request too large"})
        else:
            self._answer(self.rfile.read(length))

    def _answer(self, body: bytes) -> None:
        try:
            reply = answer(json.loads(body))
        except (ValueError, KeyError, TypeError, OSError) as error:
            self._reply(400, {"error": str(error)})
        else:
            self._reply(200, reply)

    def _reply(self, status: int, content: dict) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing for each request."""


def main() -> None:
    """Serves until Ctrl-C."""
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--host", default="127.0.0.1", help="address to listen on; others may reach it if not loopback")
    parse.add_argument("--port", type=int, default=8700)
    arguments = parse.parse_args()
    with ThreadingHTTPServer((arguments.host, arguments.port), Handler) as server:
        print(f"scoring at http://{arguments.host}:{server.server_port}", flush=True)  # noqa: T201
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
