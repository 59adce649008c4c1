"""An HTTP server that answers as a test says, and remembers what it was asked."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """`answer(path, request, number)` gives `(status, headers, body)`, a value to send as JSON, or None to hang up."""

    def __init__(self, answer, port=0):
        self.answer, self.requests, self.headers = answer, [], []
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    fake.requests.append(json.loads(body) if body else None)
                    fake.headers.append(dict(self.headers))
                    number = len(fake.requests)
                self._send(fake.answer(self.path, fake.requests[number - 1], number))

            def do_GET(self):
                self.do_POST()

            def _send(self, reply):
                if reply is None:
                    self.close_connection = True
                    return
                if not isinstance(reply, tuple):
                    reply = (200, {}, json.dumps(reply).encode())
                status, headers, body = reply
                self.send_response(status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client may have had enough
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
