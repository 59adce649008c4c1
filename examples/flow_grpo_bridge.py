"""A scorer that speaks flow_grpo's pickled HTTP, behind the engine's JSON protocol.

    python examples/flow_grpo_bridge.py --scorer http://127.0.0.1:18085 --port 8700
    rewards: [{name: http://127.0.0.1:8700/score, weight: 1.0}]

Run it where the scorer runs, and let it reach nothing else: it unpickles what that scorer answers, which is as much
trust as running the scorer's code. The engine itself never unpickles.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import pickle
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCORE_KEYS = ("scores", "score", "rewards", "outputs")
MAX_BODY_BYTES = 256 << 20


def ask(scorer: str, prompts: list[str], pngs: list[bytes]) -> list[float]:
    """Scores of images, from a server that takes and answers pickles."""
    jpegs = [as_jpeg(png) for png in pngs]
    payload = pickle.dumps({"images": jpegs, "prompts": prompts, "meta_datas": [{} for _ in prompts], "metadata": {}})
    request = urllib.request.Request(scorer, data=payload, method="POST")
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = pickle.loads(response.read())  # noqa: S301 - see the docstring: the scorer is trusted, and on this side
    for key in SCORE_KEYS:
        if isinstance(answer, dict) and key in answer:
            return [float(score) for score in answer[key]]
    found = sorted(answer) if isinstance(answer, dict) else type(answer).__name__
    raise ValueError(f"the scorer answered {found}; takes one of {', '.join(SCORE_KEYS)}")


def as_jpeg(png: bytes) -> bytes:
    """What flow_grpo's clients send."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def handler_of(scorer: str) -> type[BaseHTTPRequestHandler]:
    """The engine's protocol: `{items: [{id, prompt, image}]}` in, `{scores: [{id, score}]}` out; null is no opinion."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            if size > MAX_BODY_BYTES:
                self._answer(413, {"error": "too large"})
                return
            items = json.loads(self.rfile.read(size))["items"]
            images = [base64.b64decode(item["image"]) for item in items]
            try:
                scores = ask(scorer, [item["prompt"] for item in items], images)
            except (OSError, ValueError, pickle.UnpicklingError) as error:
                self._answer(502, {"error": f"{scorer}: {error}"})
                return
            rows = [
                {"id": i["id"], "score": s if math.isfinite(s) else None} for i, s in zip(items, scores, strict=True)
            ]
            self._answer(200, {"scores": rows})

        def _answer(self, status: int, content: dict) -> None:
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
    """Listens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", required=True, help="address of the scorer")
    parser.add_argument("--port", type=int, default=8700)
    arguments = parser.parse_args()
    ThreadingHTTPServer(("127.0.0.1", arguments.port), handler_of(arguments.scorer)).serve_forever()


if __name__ == "__main__":
    main()
