"""A served run without an engine: the real HTTP side and its store, pairs put there by hand, and the page in front."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import uvicorn
from PIL import Image
from serve.serving import shapes_config, told

from fdfo_engine.label.access import Passes, Session
from fdfo_engine.label.link import EngineLink
from fdfo_engine.label.page import Page
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.serve.access import token_of
from fdfo_engine.serve.address import ADDRESS_NAME
from fdfo_engine.serve.app import application
from fdfo_engine.serve.backend import Backend, Bell
from fdfo_engine.serve.database import Database
from fdfo_engine.serve.server import Door

HOSTS = ["127.0.0.1", "localhost", "[::1]"]


class PairedRun:
    """`config` of a run folder, the server's application for it, and the store behind."""

    def __init__(self, folder, *more):
        self.folder = folder
        self.database, self._log = Database(folder), EventLog(folder)
        stream = told(EventStream([self._log]))
        config = shapes_config(folder, "labels.strip=0", *more)
        self.backend = Backend(config, self.database, token_of(folder), stream, Bell(), ranks=1)
        self.backend.is_ready = True
        self.engine = application(self.backend, hosts=Door().names)
        (folder / ADDRESS_NAME).write_text(json.dumps({"url": "http://127.0.0.1:8710"}))

    def close(self):
        self.database.close()
        self._log.close()

    def add_round(self, count=4, kind="sample", prompt="a red circle"):
        """A round of so many pairs, with pictures; returns its name."""
        backend = self.backend
        number = backend.submit(kind, {"count": count, "of": time.time()}).id
        first = number * 1000
        images = [[f"{first + n:016x}{branch:016x}" for branch in range(2)] for n in range(count)]
        for place, pair in enumerate(images):
            self._draw(pair, place)
        name = f"{'c' if kind == 'compare' else 'r'}{number}"
        pairs = [
            {"pair_id": first + n, "prompt": prompt, "distance": 1.0 + n, "images": pair}
            for n, pair in enumerate(images)
        ]
        result = {"round": name, "first_pair": first, "sampled": count, "weights_version": 0, "epoch": 0}
        backend.add_round(number, result | {"pairs": pairs})
        backend.queue.finish(number, result)
        return name

    def image_file(self, image):
        return self.folder / "serve" / "images" / f"{image}.png"

    def _draw(self, pair, place):
        for branch, image in enumerate(pair):
            path = self.image_file(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8, 3), 40 + 30 * (place % 6), dtype=np.uint8)
            pixels[2:6, 2:6, branch] = 255
            Image.fromarray(pixels).save(path)

    @property
    def passes(self):
        return Passes(self.backend.token)

    def page(self, transport=None):
        """The page in front of it; requests reach the server's application without a network."""
        link = EngineLink(self.folder, transport=transport or httpx.ASGITransport(self.engine))
        return Page(link, self.passes, HOSTS)

    def word(self, rater="owner", role="owner"):
        return self.passes.word(Session(rater, role))


@contextmanager
def listening(app):
    """`app` behind a real port of this machine; gives the address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
