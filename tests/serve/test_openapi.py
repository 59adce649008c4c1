"""The OpenAPI description: committed, and held by requests that are generated from it."""

import json
import threading
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serve.serving import shapes_config, told
from starlette.testclient import TestClient

from fdfo_engine.config import dump_config
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.runtime.run_folder import record_config
from fdfo_engine.serve import backend as backend_module
from fdfo_engine.serve.access import token_of
from fdfo_engine.serve.app import ENDPOINTS, application
from fdfo_engine.serve.backend import Backend, Bell
from fdfo_engine.serve.database import Database
from fdfo_engine.serve.openapi import description
from fdfo_engine.serve.problems import Problem
from fdfo_engine.serve.server import Door

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "schema" / "openapi.json"


def test_the_committed_description_is_the_present_one():
    """`fdfo schema openapi > docs/schema/openapi.json` writes it anew."""
    assert json.loads(COMMITTED.read_text()) == json.loads(json.dumps(description(ENDPOINTS)))


class InstantEngine(threading.Thread):
    """Ends every operation at once: what is tried here is the door, not the engine."""

    def __init__(self, backend):
        super().__init__(daemon=True)
        self.backend, self.is_over = backend, False

    def run(self):
        queue = self.backend.queue
        while not self.is_over:
            operation = queue.start_next()
            if operation is None:
                self.backend.has_work.wait(0.01)
                self.backend.has_work.clear()
                continue
            if operation.kind == "sample":
                self.sample(operation)
            elif operation.kind == "generate":
                queue.finish(operation.id, None, Problem(409, "state", "no engine").record)
            else:
                queue.finish(operation.id, {"round": operation.body.get("round")})
            self.backend.bell.ring()

    def sample(self, operation):
        texts = operation.body.get("prompts") or ["a red circle"] * 2
        pairs = [
            {"pair_id": 10_000 * operation.id + n, "prompt": text, "distance": 0.1,
             "images": [f"{operation.id:016x}{n:015x}{branch}" for branch in range(2)]}
            for n, text in enumerate(texts)
        ]  # fmt: skip
        result = {"round": f"r{operation.id}", "first_pair": 0, "sampled": len(texts), "epoch": 0, "weights_version": 0}
        self.backend.add_round(operation.id, result | {"pairs": pairs})
        self.backend.queue.finish(operation.id, result | {"pairs": pairs})


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_module, "GAP_WAIT_S", 0.02)  # most generated numbers come too early
        yield from served_instantly(tmp_path_factory)


def served_instantly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    config = shapes_config(folder)
    record_config(folder, dump_config(config))  # the report wants a run
    database, log = Database(folder), EventLog(folder)
    backend = Backend(config, database, token_of(folder), told(EventStream([log])), Bell(), ranks=1)
    backend.is_ready = True
    engine = InstantEngine(backend)
    engine.start()
    app = application(backend, hosts=[*Door().names, "testserver"])
    with TestClient(app) as client:
        client.headers["Authorization"] = f"Bearer {backend.token}"
        for body in ({"seq": 1}, {"seq": 2, "prompts": ["a red circle", "<script>alert(1)</script>"]}):
            assert client.post("/v1/sample?wait=10", json=body).status_code == 200
        yield client, schemathesis.openapi.from_asgi("/v1/openapi.json", app, headers=dict(client.headers))
    engine.is_over = True
    engine.join(5)
    database.close()
    log.close()


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: f"{endpoint.method} {endpoint.path}")
@pytest.mark.filterwarnings("ignore")
def test_generated_requests_meet_only_described_answers(api, endpoint, request):
    """No 5xx but those described, no undescribed status, every body as described."""
    examples = 60 if request.config.getoption("-m") == "slow or not slow" else 8
    client, schema = api
    operation = schema[endpoint.path.replace(":path", "")][endpoint.method]

    @given(case=operation.as_strategy())
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def holds(case):
        # a request that fits the description is refused where the state forbids it, such as a key of another request
        case.call_and_validate(
            headers={"Authorization": client.headers["Authorization"]}, excluded_checks=[positive_data_acceptance]
        )

    holds()
