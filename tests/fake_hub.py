"""A hub's cache on disk, as huggingface_hub lays it out: blobs by hash, snapshots of symlinks, refs; no network.

And the hub itself, over HTTP on this machine.
"""

import hashlib
import http.server
import json
import threading
import urllib.parse
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api

LARGE_BYTES = 5_000
"""As on the hub, weights lie in large-file storage, whose blobs are named by SHA-256; small files' by git's SHA-1."""


def use_cache(monkeypatch, cache):
    """Makes `cache` the hub's cache of this process, and the hub out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def publish(cache, repository, folder, *, branch="main"):
    """Commits the files of `folder` to `repository` and moves `branch` there; returns the snapshot's folder."""
    root = Path(cache) / f"models--{repository.replace('/', '--')}"
    files = {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    commit = hashlib.sha1(b"".join(str(name).encode() + data for name, data in files.items())).hexdigest()
    snapshot = root / "snapshots" / commit
    for name, data in files.items():
        blob = root / "blobs" / blob_name(data)
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + len(name.parts) - 1)) / "blobs" / blob.name)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return snapshot


def blob_name(data):
    """SHA-256 of a large file; of a small one SHA-1 as git takes it."""
    if len(data) >= LARGE_BYTES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The hub over HTTP on this machine: gives the files of folders, and refuses as huggingface.co does.

    Attributes:
        folders: of the repositories that it gives, by OWNER/NAME.
        gated: those whose licence must be accepted; `members` are the tokens that have.
        tokens: those that it knows.
        status: what it answers whatever is asked, if not None.
        asked: method and path of every request.
    """

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self):
        self.folders, self.gated, self.tokens, self.members, self.status, self.asked = {}, set(), set(), set(), None, []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Answers, self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def refusal(self, repository, token):
        """Status, code and message of the refusal; None where the repository is given."""
        if self.status is not None:
            return self.status, "", ""
        if token is not None and token not in self.tokens:
            return 401, "", "Invalid credentials in Authorization header"
        if repository not in self.folders:
            return (404 if token else 401), "RepoNotFound", "Repository not found"
        if repository in self.gated and token not in self.members:
            return (403 if token else 401), "GatedRepo", f"Access to model {repository} is restricted."
        return None


class _Answers(http.server.BaseHTTPRequestHandler):
    def __init__(self, hub, *arguments):
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.hub.asked.append((self.command, path))
        is_api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repository = f"{owner}/{name}"
        word = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if refused := self.hub.refusal(repository, word):
            status, code, message = refused
            return self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message}, with_body)
        if len(rest) > 1 and rest[1] not in ("main", self.hub.commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
        if is_api:
            return self._send(200, json.dumps(self._listed(repository, rest)).encode(), {}, with_body)
        file = self.hub.folders[repository] / "/".join(rest[2:])
        headers = {"X-Repo-Commit": self.hub.commit}
        if not file.is_file():
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, with_body)
        data = file.read_bytes()
        return self._send(200, data, headers | {"ETag": f'"{blob_name(data)}"'}, with_body)

    def _listed(self, repository, rest):
        """What the hub says of the repository, or its files where the tree is asked for."""
        root = self.hub.folders[repository]
        files = [p for p in sorted(root.rglob("*")) if p.is_file()]
        if rest[:1] == ["tree"]:
            return [
                {"type": "file", "path": p.relative_to(root).as_posix(), "size": p.stat().st_size,
                 "oid": blob_name(p.read_bytes())}
                for p in files
            ]  # fmt: skip
        siblings = [{"rfilename": p.relative_to(root).as_posix(), "size": p.stat().st_size} for p in files]
        return {"id": repository, "sha": self.hub.commit, "siblings": siblings, "private": False}

    def _send(self, status, data, headers, with_body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@contextmanager
def hub_of(monkeypatch, cache):
    """A `HubServer`, asked by this process, whose cache is `cache` and which nobody is logged in to."""
    hub = HubServer()
    point_at(monkeypatch, hub.url, cache)
    yield hub
    hub.close()


def point_at(monkeypatch, url, cache):
    """Lets this process ask the hub at `url`, with an empty cache and without a token."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(Path(cache) / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
