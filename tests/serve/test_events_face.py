"""Events over HTTP: by number, as they come, and across a restart, without a gap or a double."""

import asyncio
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from serve.serving import shapes_config, told

from fdfo_engine.client import AsyncClient, Client
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.events import Caution, EventStream
from fdfo_engine.serve.access import token_of
from fdfo_engine.serve.backend import Backend, Bell
from fdfo_engine.serve.database import Database
from fdfo_engine.serve.server import Door, listening


@contextmanager
def telling(folder, port=0):
    """An address without an engine, and a function that tells an event."""
    database, log = Database(folder), EventLog(folder)
    events = EventStream([log], last_seq=log.last_seq)
    backend = Backend(shapes_config(folder), database, token_of(folder), told(events), Bell(), ranks=1)

    def tell(text):
        events.tell(Caution(epoch=0, message=text))
        backend.bell.ring()

    try:
        with listening(backend, Door(port=port), folder) as url:
            yield url, tell
    finally:
        database.close()
        log.close()


def test_a_list_by_number(tmp_path):
    with telling(tmp_path) as (url, tell), Client(url, token_of(tmp_path)) as client:
        for n in range(600):  # over several marks of the feed
            tell(f"message {n}")
        ask = {"headers": {"Authorization": f"Bearer {token_of(tmp_path)}"}}
        for after, limit, expected in (
            (0, 3, (1, 3)),
            (255, 2, (256, 257)),
            (599, 10, (600, 600)),
            (511, 1000, (512, 600)),
        ):
            answer = httpx.get(f"{url}/v1/events", params={"after": after, "limit": limit}, **ask).json()
            assert (answer["events"][0]["seq"], answer["events"][-1]["seq"]) == expected
            assert answer["last"] == expected[1]
            assert answer["events"][0]["data"]["message"] == f"message {expected[0] - 1}"
        assert httpx.get(f"{url}/v1/events", params={"after": 600}, **ask).json() == {"events": [], "last": 600}
        assert httpx.get(f"{url}/v1/events", params={"after": 10**12}, **ask).json() == {"events": [], "last": 600}
        assert httpx.get(f"{url}/v1/events", params={"after": -1}, **ask).status_code == 422
        client.close()


def test_a_stream_says_what_proxies_need_and_begins_where_it_is_asked(tmp_path):
    with telling(tmp_path) as (url, tell):
        for n in range(4):
            tell(f"message {n}")
        headers = {"Authorization": f"Bearer {token_of(tmp_path)}", "Accept": "text/event-stream", "Last-Event-ID": "2"}
        with httpx.stream("GET", f"{url}/v1/events", headers=headers) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-store"
            assert response.headers["x-accel-buffering"] == "no"
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                if line.startswith("data") and '"seq": 4' in line:
                    break
        assert [line for line in lines if line.startswith("id:")] == ["id: 3", "id: 4"]
        assert lines.count("event: warning") == 2
        bad = httpx.get(f"{url}/v1/events", headers=headers | {"Last-Event-ID": "x"})
        assert (bad.status_code, bad.json()["code"]) == (400, "bad_event_id")


def test_a_follower_goes_on_across_restarts(tmp_path):
    seen = []
    with telling(tmp_path) as (url, tell):
        port = int(url.rsplit(":", 1)[1])
        client = Client(url, token_of(tmp_path))
        thread = threading.Thread(target=lambda: seen.extend(take(client.events(), 9)))
        thread.start()
        for n in range(1, 4):
            tell(f"message {n}")
    for first in (4, 7):
        with telling(tmp_path, port) as (_, tell):
            for n in range(first, first + 3):
                tell(f"message {n}")
                time.sleep(0.05)
    with telling(tmp_path, port):
        thread.join(30)
    client.close()
    assert [event["seq"] for event in seen] == list(range(1, 10))
    assert [event["data"]["message"] for event in seen] == [f"message {n}" for n in range(1, 10)]


def test_the_asynchronous_client_follows_too(tmp_path):
    async def follow(url):
        async with AsyncClient(url, token_of(tmp_path)) as client:
            assert (await client.capabilities())["ranks"] == 1
            events = client.events(after=1)
            seen = [(await anext(events))["seq"] for _ in range(2)]
            await events.aclose()
            return seen

    with telling(tmp_path) as (url, tell):
        for n in range(3):
            tell(f"message {n}")
        assert asyncio.run(follow(url)) == [2, 3]


def take(events, count):
    return [event for _, event in zip(range(count), events, strict=False)]


@pytest.mark.parametrize("silent_s", [0.3])
def test_silence_is_broken_by_comments(tmp_path, monkeypatch, silent_s):
    monkeypatch.setattr("fdfo_engine.serve.faces.events.KEEP_ALIVE_S", silent_s)
    with telling(tmp_path) as (url, _):
        headers = {"Authorization": f"Bearer {token_of(tmp_path)}", "Accept": "text/event-stream"}
        with httpx.stream("GET", f"{url}/v1/events", headers=headers) as response:
            lines = response.iter_lines()
            comments = take((line for line in lines if line.startswith(":")), 2)
            lines.close()
    assert comments == [": still here"] * 2
