"""HTTP bodies of the server and of the label page, damaged: an answer that says what is wrong, and never a bug."""

import json
import random

import pytest
from fuzz.mutating import mutated_bytes, mutated_json
from label.paired import PairedRun
from serve import test_openapi
from starlette.testclient import TestClient

from fdfo_engine.label.access import Session
from fdfo_engine.serve import backend as backend_module

FEW, MANY = range(3), range(3, 250)
SCORES = {f"{2:016x}{1:015x}{branch}": 0.5 + branch for branch in range(2)}
"""By the ids of both images of a pair, as the engine of test_openapi makes them."""

SERVED = {
    "/v1/session": {"token": "nobody's"},
    "/v1/run/export": {"style": "diffusers", "weights": "auto"},
    "/v1/rounds": {"prompts": ["a red circle"], "copies": 1, "keep": {"of": 2, "by": "distance"}},
    "/v1/comparisons": {"count": 2, "seed": 1},
    "/v1/rounds/r2/feedback": {
        "rater": "ann", "judgements": [{"pair_id": 20000, "choice": "left"}, {"pair_id": 20001, "scores": SCORES}],
    },
    "/v1/rounds/r2/train": {"minimum": 1},
    "/v1/sample": {"seq": 9, "prompts": ["a red circle"], "copies": 2},
    "/v1/compute_reward": {"seq": 9, "round": "r2"},
    "/v1/forward": {"seq": 9, "round": "r2", "part": 0, "parts": 2},
    "/v1/forward_backward": {"seq": 9, "round": "r2", "rewards": {"20000": [1.0, 0.0]}, "loss_fn": "fdfo"},
    "/v1/optim_step": {"seq": 9, "lr": 0.001},
    "/v1/load_state": {"seq": 9, "name": "epoch_000001"},
    "/v1/images/generations": {"prompt": "a red circle", "n": 1, "seed": 3, "model": "run"},
}  # fmt: skip
PAGE = {
    "/api/session": {"word": "nobody's"},
    "/api/label": {"round": "r1", "pair_id": 1000, "choice": "left", "ms": 900, "flips": 1, "zooms": 0},
    "/api/undo": {"round": "r1", "event": 1},
    "/api/train": {"round": "r1"},
    "/api/compare": {},
    "/api/next": {},
    "/api/again": {},
    "/api/link": {"name": "ann"},
}
SEEDS = pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])


def served(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_module, "GAP_WAIT_S", 0.005)
        for client, _ in test_openapi.served_instantly(tmp_path_factory):
            yield client


def labelled(tmp_path_factory):
    """The label page with its owner signed in; what its code raises is raised here."""
    run = PairedRun(tmp_path_factory.mktemp("page"))
    run.add_round()
    headers = {"Sec-Fetch-Site": "same-origin"}
    with TestClient(run.page().application(), base_url="http://127.0.0.1:8720", headers=headers) as client:
        word = run.passes.word(Session("owner", "owner"))
        assert client.post("/api/session", json={"word": word}).status_code == 204
        yield client
    run.close()


api, page = (pytest.fixture(scope="module", name=name)(of) for name, of in (("api", served), ("page", labelled)))
untouched_api, untouched_page = (
    pytest.fixture(name=name)(of) for name, of in (("untouched_api", served), ("untouched_page", labelled))
)


def hold(client, path, body, seeds):
    for seed in seeds:
        rng = random.Random(f"{path} {seed}")
        data = rng.choice((mutated_bytes, mutated_json, mutated_json))(json.dumps(body).encode(), rng)
        kind = rng.choice(("application/json",) * 5 + ("text/plain", "application/json; charset=utf-16", ""))
        response = client.post(path, content=data, headers={"Content-Type": kind})
        assert response.status_code < 500 or response.status_code == 503, (data, response.text)
        if response.status_code >= 400:
            assert "Traceback" not in response.text
            assert response.json(), data


def test_undamaged_requests_have_the_right_form(untouched_api, untouched_page):
    """So the damage is what the others are refused for."""
    for client, bodies in ((untouched_api, SERVED), (untouched_page, PAGE)):
        for path, body in bodies.items():
            response = client.post(path, json=body)
            assert response.status_code not in (400, 405, 415, 422), (path, response.text)


@SEEDS
@pytest.mark.parametrize("path", SERVED)
def test_a_damaged_request_of_a_program_is_answered_in_words(api, path, seeds):
    hold(api, path, SERVED[path], seeds)


@SEEDS
@pytest.mark.parametrize("path", PAGE)
def test_a_damaged_request_of_the_page_is_answered_in_words(page, path, seeds):
    hold(page, path, PAGE[path], seeds)
