"""Replies of reward servers, damaged: a score that was sent, no opinion, or the words of a `RewardError`."""

import contextlib
import json
import math
import random

import pytest
import torch
from fuzz.mutating import mutated_bytes, mutated_json
from rewards.fake_server import FakeServer
from rewards.server_clients import IMAGES, PROMPTS, completion, http, vlm_server

from fdfo_engine.rewards import json_server
from fdfo_engine.runtime.errors import RewardError

FEW, MANY = range(6), range(6, 400)
SENT = {"0": 0.25, "1": -3.5}
KEY = "Zq7vRt2LxW9pKd4M"


def scores_of_own_server(url):
    return http(url, timeout_s=5.0, give_up_after_s=0.2)(PROMPTS[:2], IMAGES[:2])


def scores_of_chat(url):
    return vlm_server(url, give_up_after_s=0.2)(PROMPTS[:2], IMAGES[:2])


def in_percent(difference):
    return 100 / (1 + math.exp(-difference))


KINDS = {
    "http": (scores_of_own_server, {"scores": [{"id": id_, "score": score} for id_, score in SENT.items()]}),
    "vlm_server": (scores_of_chat, completion(Yes=-0.5, No=-1.5, maybe=-4.0)),
}
"""How the scores of two images are asked for, and the reply."""


@pytest.fixture
def replying(monkeypatch):
    """A server that sends what `reply` holds, and echoes the key that it was sent."""
    monkeypatch.setattr(json_server, "_LONGEST_WAIT_S", 0.001)
    monkeypatch.setenv("FDFO_REWARD_KEY", KEY)
    reply = {}
    server = FakeServer(lambda path, request, number: reply["now"])
    yield server.url, reply
    server.close()


def test_undamaged_replies_are_what_was_sent(replying):
    url, reply = replying
    for name, wanted in (("http", list(SENT.values())), ("vlm_server", [in_percent(1.0)] * 2)):
        ask, sent = KINDS[name]
        reply["now"] = sent
        assert ask(url).tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_reply_is_no_opinion_or_words(replying, capsys, name, seeds):
    url, reply = replying
    ask, sent = KINDS[name]
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        body = rng.choice((mutated_bytes, mutated_json))(json.dumps(sent | {"key": KEY}).encode(), rng)
        status = rng.choice((200, 200, 200, 200, 200, 201, 302, 400, 401, 404, 429, 500, 503))
        kind = rng.choice(("application/json",) * 4 + ("text/html", ""))
        reply["now"] = (status, {"Content-Type": kind, "Retry-After": rng.choice(("0", "soon", "9" * 30))}, body)
        with contextlib.suppress(RewardError):
            scores = ask(url)
            assert scores.shape == (2,)
            assert not torch.isinf(scores).any(), body
            assert status == 200 or torch.isnan(scores).all(), (status, body)
        assert KEY not in capsys.readouterr().err
