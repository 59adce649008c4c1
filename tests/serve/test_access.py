"""Who may ask: tables of hosts, origins, tokens and cookies, against the real application without an engine."""

import stat

import pytest
from serve.serving import shapes_config, told
from starlette.testclient import TestClient

from fdfo_engine.runtime.errors import CheckpointError, UsageError
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.serve.access import COOKIE, token_of
from fdfo_engine.serve.app import ENDPOINTS, application
from fdfo_engine.serve.backend import Backend, Bell
from fdfo_engine.serve.database import Database
from fdfo_engine.serve.server import Door

HOST = "http://127.0.0.1:8710"


@pytest.fixture
def backend(tmp_path):
    database, log = Database(tmp_path), EventLog(tmp_path)
    yield Backend(shapes_config(tmp_path), database, token_of(tmp_path), told(EventStream([log])), Bell(), ranks=1)
    database.close()
    log.close()


@pytest.fixture
def client(backend):
    app = application(backend, hosts=[*Door().names, "lab.example"], origins=["http://localhost:3000"])
    with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
        yield client


def bearer(backend):
    return {"Authorization": f"Bearer {backend.token}"}


def asks(client, backend, **headers):
    return client.get("/v1/run", headers={**bearer(backend), **headers})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8710", 200), ("localhost:8710", 200), ("LOCALHOST", 200), ("[::1]:8710", 200), ("lab.example", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example:8710", 403), ("", 403),
        ("192.168.0.7:8710", 403), ("lab.example:8710:8710", 403), ("[::1", 403), ("0.0.0.0", 403),
    ],
)  # fmt: skip
def test_hosts(client, backend, host, status):
    response = asks(client, backend, Host=host)
    assert response.status_code == status
    if status == 403:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"] == "host"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8710", 200), ("http://localhost:3000", 200),
        ("http://127.0.0.1:8711", 403), ("https://evil.example", 403), ("null", 403), ("*", 403), ("file://", 403),
        ("http://127.0.0.1:8710.evil.example", 403), ("http://localhost:3001", 403), ("", 403),
        ("ftp://127.0.0.1:8710", 403), ("http://127.0.0.1:8710@evil.example", 403),
    ],
)  # fmt: skip
def test_origins(client, backend, origin, status):
    response = asks(client, backend, Origin=origin)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic dXNlcjpwYXNz", "bearer\twrong", "Bearer ä"]
)
def test_without_the_token_nothing_is_told(client, given):
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{file:path}", "x").replace("{operation}", "1")
        response = client.request(endpoint.method, path, headers={"Authorization": given.encode()})
        if not endpoint.is_open:
            assert response.status_code == 401, path
            assert response.json()["code"] == "token"


def test_the_token_is_taken_in_any_case_of_the_scheme_and_by_no_query(client, backend):
    assert client.get("/v1/run", headers={"Authorization": f"bearer {backend.token}"}).status_code == 200
    assert client.get(f"/v1/run?token={backend.token}").status_code == 401


def test_a_page_exchanges_the_token_for_a_cookie_that_scripts_cannot_read(client, backend):
    assert client.post("/v1/session", json={"token": "wrong"}).status_code == 401
    response = client.post("/v1/session", json={"token": backend.token})
    assert response.status_code == 204
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    client.cookies.set(COOKIE, backend.token)
    assert client.get("/v1/run").status_code == 200


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 202), ("none", 202), ("cross-site", 403), ("same-site", 403), ("", 403)]
)
def test_with_a_cookie_another_sites_page_changes_nothing(client, backend, site, status):
    client.cookies.set(COOKIE, backend.token)
    response = client.post("/v1/run/pause", json={}, headers={"Sec-Fetch-Site": site})
    assert response.status_code == status


def test_the_token_lies_in_a_file_of_its_owner(tmp_path):
    token = token_of(tmp_path)
    path = tmp_path / "serve.token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 32
    assert token_of(tmp_path) == token
    path.chmod(0o644)
    with pytest.raises(CheckpointError, match="others may read it"):
        token_of(tmp_path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(CheckpointError, match="holds no token"):
        token_of(tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "lab.example", ""])
def test_an_address_of_other_machines_is_refused_with_the_tunnel(host):
    with pytest.raises(UsageError, match=r"ssh -L 8710:127\.0\.0\.1:8710"):
        Door(host=host).check()
    Door(host=host, allow_remote=True).check()


@pytest.mark.parametrize("origin", ["*", "null"])
def test_an_origin_that_means_anybody_is_refused(origin):
    with pytest.raises(UsageError, match="means anybody"):
        Door(origins=[origin]).check()


@pytest.mark.parametrize(
    ("raw", "media", "status", "code"),
    [
        (b"{", "application/json", 400, "not_json"),
        (b'{"a": NaN}', "application/json", 400, "not_json"),
        (b"[" * 100_000, "application/json", 400, "not_json"),
        (b"\xff\xfe", "application/json", 400, "not_json"),
        (b"{}", "text/plain", 415, "media_type"),
        (b"{}", "", 415, "media_type"),
        (b"[]", "application/json", 422, "invalid"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "media_type"),
        (b" " * (5 << 20), "application/json", 413, "too_large"),
        (b'{"prompts": []}', "application/json", 422, "invalid"),
        (b'{"prompts": [" "]}', "application/json", 422, "invalid"),
        (b'{"cuont": 1}', "application/json", 422, "invalid"),
        (b'{"count": "2"}', "application/json", 422, "invalid"),
        (b'{"count": 1, "prompts": ["a"]}', "application/json", 422, "invalid"),
    ],
)
def test_bodies_that_are_refused(client, backend, raw, media, status, code):
    response = client.post("/v1/rounds", content=raw, headers={**bearer(backend), "Content-Type": media})
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert backend.queue.operations("queued") == []


def test_all_wrong_fields_are_told_at_once(client, backend):
    body = {
        "rater": "no spaces here",
        "judgements": [{"pair_id": -1, "choice": "left"}, {"pair_id": 1, "choice": "up"}],
    }
    response = client.post("/v1/rounds/r1/feedback", json=body, headers=bearer(backend))
    assert response.status_code == 422
    pointers = {error["pointer"] for error in response.json()["errors"]}
    assert pointers == {"/rater", "/judgements/0/pair_id", "/judgements/1/choice"}


@pytest.mark.parametrize(
    "image",
    [
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e/serve.token",
        "../serve.token",
        "a" * 32 + "%00",
        "%00",
        "A" * 32,
        "serve.token",
    ],
)
def test_no_image_id_leads_to_another_file(client, backend, image):
    response = client.get(f"/v1/images/{image}/content", headers=bearer(backend))
    assert response.status_code == 404


def test_what_there_is_not_and_what_is_not_done(client, backend):
    assert client.get("/v1/nothing", headers=bearer(backend)).json()["code"] == "not_found"
    response = client.delete("/v1/run", headers=bearer(backend))
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert client.get("/readyz").status_code == 503
    assert int(client.get("/readyz").headers["retry-after"]) > 0
    assert client.get("/v1/rounds/r9", headers=bearer(backend)).status_code == 404
    assert client.get("/v1/operations/99", headers=bearer(backend)).status_code == 404
