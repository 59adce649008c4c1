"""A server is asked about a picture before a run; what it cannot do is found out then, and told in one line later."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from rewards.server_clients import IMAGES, PROMPTS, brightness, completion, http, pixels_of, vlm_server
from tenacity import RetryCallState

from fdfo_engine.rewards import json_server
from fdfo_engine.runtime.errors import RewardError


def test_a_real_picture_is_asked_about_first(serve):
    server = serve(brightness)
    http(server.url).require_ready()
    ((item,),) = [request["items"] for request in server.requests]
    assert (item["prompt"], pixels_of(item).shape) == ("a red circle", (256, 256, 3))
    http(server.url, ask_first=False).require_ready()
    assert server.requests[1] == {"version": 1, "items": []}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "returned 0 scores for 1 images"),
        ([{"id": "7", "score": 1.0}], r"returned scores for ids \['7'\], asked for \['0'\]"),
        ([{"id": "0", "score": "high"}], r"(?s)asked about a drawn picture \(ask_first\): not of the protocol.*curl"),
    ],
)
def test_a_server_that_cannot_score_is_found_out_at_the_start(serve, scores, message):
    """Each of them answers an empty list of items as it should."""
    server = serve(lambda p, request, n: {"scores": scores if request["items"] else []})
    http(server.url, ask_first=False).require_ready()
    with pytest.raises(RewardError, match=message):
        http(server.url).require_ready()


def test_no_opinion_on_the_first_picture_is_no_failure(serve):
    http(serve(lambda p, r, n: {"scores": [{"id": "0", "score": None}]}).url).require_ready()


REPLIES = Path(__file__).parent / "replies"


def reply(name):
    return json.loads((REPLIES / f"{name}.json").read_text())


def with_models(answer):
    """A server that has the model, and answers every question with `answer`."""
    return lambda path, request, number: {"data": [{"id": "eye"}]} if path == "/v1/models" else answer


@pytest.mark.parametrize("name", ["vlm_same_text_twice", "vlm_null_elsewhere"])
def test_replies_of_real_servers(serve, name):
    reward = vlm_server(serve(with_models(reply(name))).url)
    reward.require_ready()
    (score,) = reward(PROMPTS[:1], IMAGES[:1]).tolist()
    assert score == pytest.approx(100 / (1 + math.exp(-2.4)), abs=1e-3)
    assert reward.take_notes()["answer_mass"].tolist() == pytest.approx([math.exp(-0.1) + math.exp(-2.5)], abs=1e-5)
    assert reward.take_notes()["answer_mass"].shape == (0,)


LEGACY = {"tokens": ["Yes"], "token_logprobs": [-0.1], "top_logprobs": [{"Yes": -0.1, "No": -2.5}], "text_offset": [0]}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply("vlm_no_logprobs"), r"no log-probabilities: choices\.0\.logprobs is null"),
        ({"choices": [{"message": {}}]}, r"choices\.0\.logprobs is missing beside message"),
        ({"choices": [{"logprobs": LEGACY}]}, r"choices\.0\.logprobs\.content is missing beside .*token_logprobs"),
        ({"choices": [{"logprobs": {"content": [{"top_logprobs": []}]}}]}, r"content\.0\.top_logprobs is \[\]"),
        ({"error": {"message": "no"}}, "choices is missing beside error"),
        (completion(Yes=-0.1, Maybe=-3.0), "'No' not among the answer's tokens: 'Yes', 'Maybe'"),
        (completion(Yes=-9999.0, No=-9999.0, x=-0.1), "both answers are at -9999"),
        (completion(Yes=-8.0, No=-9.0, x=-0.1), "hold less than least_mass .* the likeliest is 'x'"),
        (completion(Yes=20.0, No=10.0), "logits or probabilities"),
        ((500, {}, b"CUDA error"), "HTTP 500: CUDA error"),
    ],
)
def test_a_model_that_cannot_answer_is_found_out_at_the_start(serve, answer, reason):
    server = serve(with_models(answer))
    with pytest.raises(RewardError, match=rf"(?s)asked about a drawn picture \(ask_first\): .*{reason}.*curl"):
        vlm_server(server.url).require_ready()
    assert len(server.requests) == 2
    vlm_server(server.url, ask_first=False).require_ready()


def test_the_first_question_is_the_runs_own(serve):
    server = serve(with_models(completion(Yes=-0.1, No=-2.5)))
    vlm_server(server.url, question="Is {prompt} red?").require_ready()
    picture, question = server.requests[1]["messages"][0]["content"]
    assert question["text"] == "Is a red circle red?"
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert (server.requests[1]["max_tokens"], server.requests[1]["top_logprobs"]) == (1, 20)


def test_equal_warnings_are_one_line_with_a_count(serve, capsys):
    reward = vlm_server(serve(with_models(reply("vlm_no_logprobs"))).url, image_size=28)
    prompts, images = [PROMPTS[0]] * 192, IMAGES[:1].expand(192, -1, -1, -1)
    assert torch.isnan(reward(prompts, images)).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("no opinion on 192 images: no log-probabilities: choices.0.logprobs is null")
    assert torch.isnan(reward.take_notes()["answer_mass"]).all()


def test_reasons_are_told_apart_and_examples_named(serve, brisk, capsys):
    def answer(path, request, number):
        index = int(re.search(r"prompt (\d)", str(request)).group(1))
        return completion(**{f"No{index}": -0.1}) if index < 3 else completion(Yes=-8.0, No=-9.0, x=-0.1)

    assert torch.isnan(vlm_server(serve(answer).url)(PROMPTS, IMAGES)).all()
    first, second = capsys.readouterr().err.splitlines()
    assert "no opinion on 3 images: 'Yes' and 'No' not among the answer's tokens: 'No0' (the first of them)" in first
    assert "no opinion on 2 images: 'Yes' and 'No' hold less than least_mass" in second


def test_a_reply_that_tells_nothing_is_not_asked_for_again(serve):
    """Without a temperature the same question has the same answer."""
    server = serve(lambda *_: completion(Yes=-8.0, No=-9.0, x=-0.1))
    reward = vlm_server(server.url)
    assert torch.isnan(reward(PROMPTS, IMAGES)).all()
    assert len(server.requests) == 5
    assert reward.take_notes()["answer_mass"].tolist() == pytest.approx([math.exp(-8) + math.exp(-9)] * 5)


def test_what_a_second_request_mended_is_told(serve, capsys):
    server = serve(lambda p, request, n: (200, {}, b"{") if n == 1 else brightness(p, request, n))
    assert torch.isfinite(http(server.url)(PROMPTS[:2], IMAGES[:2])).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert "asked once more about 2 images: no JSON" in line


class Reply:
    """As urllib3 gives it."""

    def __init__(self, status, **headers):
        self.status, self.headers = status, {"Content-Type": "application/json", **headers}


def kind_of(status):
    """What a status costs, by the protocol's words."""
    if status in (408, 425, 429, 502, 503, 504):
        return json_server._AwayError  # asked again until it is there
    if status in (401, 403):
        return RewardError  # the run stops: no request will do better
    if status // 100 == 4:
        return json_server.NoOpinionError  # the same again would be refused again
    return json_server._BrokenError if status // 100 == 5 else json_server.BadReplyError


def test_every_status_is_of_the_kind_that_it_says():
    server = json_server.JsonServer(json_server.ServerOptions(url="http://a/"))
    for status in (*range(201, 227), *range(300, 309), *range(400, 452), *range(500, 512), 599):
        with pytest.raises((json_server._ServerError, RewardError)) as caught:
            server._judged(Reply(status), b'{"scores": []}')
        assert caught.type is kind_of(status), status
    assert server._judged(Reply(200), b'{"scores": []}') == {"scores": []}
    with pytest.raises(json_server._AwayError) as caught:
        server._judged(Reply(503, **{"Retry-After": "9"}), b"x" * 300)
    assert (caught.value.retry_after_s, caught.value.shown) == (9.0, "x" * 200)


def test_a_client_without_a_key_sends_none(monkeypatch):
    monkeypatch.delenv("FDFO_REWARD_KEY", raising=False)
    assert "Authorization" not in json_server._headers()
    monkeypatch.setenv("FDFO_REWARD_KEY", "k")
    assert json_server._headers()["Authorization"] == "Bearer k"
    assert json_server.ServerOptions(url="http://a/score//").url == "http://a/score"


def test_pauses_grow_at_random_up_to_half_a_minute():
    def longest(attempt, error):
        state = RetryCallState(None, None, (), {})
        state.attempt_number = attempt
        state.set_exception((type(error), error, None))
        return max(json_server._pause_s(state) for _ in range(400))

    away = json_server._AwayError("x")
    assert 0.4 < longest(1, away) <= 0.5
    assert 3.0 < longest(4, away) <= 4.0
    assert 25.0 < longest(30, away) <= 30.0
    assert longest(1, json_server._AwayError("x", retry_after_s=77.0)) == 77.0
    assert longest(1, json_server._BrokenError("x")) <= 0.5
