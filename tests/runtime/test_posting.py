"""Events posted to a webhook and to Kubeflow's trainer, by a server of our own."""

import json
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fdfo_engine.config import ConfigError, load_config
from fdfo_engine.runtime import events, posting
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.runtime.posting import KubeflowStatus, Webhook, is_kubeflow


@pytest.fixture
def server():
    """A server that keeps what is posted; it answers with `server.status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.got.append((self.path, dict(self.headers), json.loads(body)))
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.got, server.status = [], 200
    server.url = f"http://127.0.0.1:{server.server_port}/hook/s3cret"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def phase(done):
    return events.Phase(epoch=1, name="rollout", done=done, total=100)


def epoch(number, **values):
    return events.Metrics(epoch=number, kind="epoch", values={"epoch": number, "reward_mean": 0.5} | values)


def test_a_webhook_gets_the_lines_and_of_a_phase_only_begin_and_end(server, monkeypatch):
    monkeypatch.setenv("FDFO_WEBHOOK_KEY", "k")
    webhook, told = Webhook(server.url), []
    stream = EventStream([webhook, told.append])
    for data in [*map(phase, range(101)), epoch(1, loss=float("nan"))]:
        stream.tell(data)
    webhook.close()
    wanted = [told[0], told[100], told[101]]
    assert [body for _, _, body in server.got] == [json.loads(event.line()) for event in wanted]
    path, headers, _ = server.got[0]
    assert (path, headers["Authorization"], headers["Content-Type"]) == ("/hook/s3cret", "Bearer k", "application/json")


def test_a_phase_that_takes_long_is_told_now_and_then(server, monkeypatch):
    monkeypatch.setattr(posting, "PHASES_EVERY_S", 0.0)
    webhook = Webhook(server.url)
    stream = EventStream([webhook])
    for done in (0, 1, 2):
        stream.tell(phase(done))
    webhook.close()
    assert [body["data"]["done"] for _, _, body in server.got] == [0, 1, 2]


@pytest.mark.parametrize("status", [500, 404, 302])
def test_a_webhook_that_refuses_is_told_once_without_its_address(server, status, capsys):
    server.status = status
    webhook = Webhook(server.url)
    stream = EventStream([webhook])
    for number in (1, 2, 3):
        stream.tell(epoch(number))
    webhook.close()
    said = capsys.readouterr().err
    if status == 302:
        assert said == ""
    else:
        assert said.count("warning") == 1
        assert f"log.webhook: HTTP {status}; the run goes on" in said
    assert "s3cret" not in said
    assert len(server.got) == 3


def test_a_webhook_that_nobody_serves_costs_nothing(capsys):
    webhook = Webhook("http://127.0.0.1:9/s3cret")
    EventStream([webhook]).tell(epoch(1))
    webhook.close()
    said = capsys.readouterr().err
    assert "log.webhook: " in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("value", "words"),
    [("ftp://x/y", "http:// or https://"), ("https://me:pw@x/y", "FDFO_WEBHOOK_KEY"), ("x", "http:// or https://")],
)
def test_addresses_that_are_refused(value, words):
    with pytest.raises(ConfigError, match=rf"log.webhook.*{words}") as caught:
        load_config("shapes", {"log.webhook": value})
    assert "pw" not in str(caught.value)


def kubeflow(server, monkeypatch, tmp_path, epochs):
    (tmp_path / "token").write_text("first\n")
    monkeypatch.setattr(posting, "KUBEFLOW_EVERY_S", 0.0)
    for name, value in (("URL", server.url), ("CA_CERT", str(tmp_path / "ca")), ("TOKEN", str(tmp_path / "token"))):
        monkeypatch.setenv(f"KUBEFLOW_TRAINER_SERVER_{name}", value)
    assert is_kubeflow()
    return KubeflowStatus(epochs)


def test_kubeflow_gets_what_its_guide_asks_for(server, monkeypatch, tmp_path):
    status = kubeflow(server, monkeypatch, tmp_path, epochs=8)
    for event in (
        events.Event(seq=1, time=1000.0, type="state", data=events.State(epoch=2, state="running", epochs=8)),
        events.Event(seq=2, time=1030.0, type="metrics", data=epoch(3, kernel_backend="cpp")),
    ):
        status(event)
    (tmp_path / "token").write_text("second")
    status(events.Event(seq=3, time=1060.0, type="metrics", data=epoch(8)))
    status.close()
    (_, headers, first), (_, later, last) = server.got
    assert (headers["Authorization"], later["Authorization"]) == ("Bearer first", "Bearer second")
    told = first["trainerStatus"]
    assert set(told) == {"progressPercentage", "estimatedRemainingSeconds", "metrics", "lastUpdatedTime"}
    assert (told["progressPercentage"], told["estimatedRemainingSeconds"]) == (37, 150)
    assert {"name": "reward_mean", "value": "0.5"} in told["metrics"]
    assert "kernel_backend" not in [metric["name"] for metric in told["metrics"]]
    assert datetime.fromisoformat(told["lastUpdatedTime"]).timestamp() == 1030.0
    assert (last["trainerStatus"]["progressPercentage"], last["trainerStatus"]["estimatedRemainingSeconds"]) == (100, 0)


def test_kubeflow_is_asked_for_rarely_but_for_the_last_epoch(server, monkeypatch, tmp_path):
    status = kubeflow(server, monkeypatch, tmp_path, epochs=3)
    monkeypatch.setattr(posting, "KUBEFLOW_EVERY_S", 60.0)
    stream = EventStream([status])
    for number in (1, 2, 3):
        stream.tell(epoch(number))
    status.close()
    assert [body["trainerStatus"]["progressPercentage"] for _, _, body in server.got] == [33, 100]


def test_without_all_three_variables_it_is_not_kubeflow(monkeypatch):
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "https://x")
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_TOKEN", raising=False)
    assert not is_kubeflow()
