"""Rewards from servers: the protocol, and what every kind of bad server costs. Nothing is ever made up."""

import base64
import email.utils
import gzip
import io
import json
import math
import pickle
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.server_clients import IMAGES, PROMPTS, brightness, completion, http, pixels_of, vlm_server

import fdfo_engine.rewards
from fdfo_engine.rewards import WeightedRewards, build, json_server
from fdfo_engine.runtime.errors import RewardError, UsageError


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The reward server of one's own


def test_scores_come_back_under_their_ids(serve):
    server = serve(brightness)
    reward = http(server.url, concurrency=3)
    reward.require_ready()
    scores = reward(PROMPTS, IMAGES)
    assert (scores - IMAGES.mean((1, 2, 3))).abs().max() < 1e-6
    items = [item for request in server.requests[1:] for item in request["items"]]  # after the one that asks first
    assert sorted(item["id"] for item in items) == list("01234")
    for item in items:
        assert item["prompt"] == PROMPTS[int(item["id"])]
        expected = (IMAGES[int(item["id"])] * 255).round().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels_of(item), expected)  # PNG loses nothing


def test_the_example_is_such_a_server(serve):
    from examples.reward_server import answer

    server = serve(lambda path, request, number: answer(request))
    reward = http(server.url)
    reward.require_ready()
    assert (reward(PROMPTS, IMAGES) - IMAGES.mean((1, 2, 3))).abs().max() < 1e-6


def test_the_key_travels_in_a_header_only(serve, monkeypatch):
    monkeypatch.setenv("FDFO_REWARD_KEY", "very-secret")
    server = serve(brightness)
    http(server.url)(PROMPTS[:1], IMAGES[:1])
    assert server.headers[0]["Authorization"] == "Bearer very-secret"
    assert "very-secret" not in json.dumps(server.requests)


def test_null_is_no_opinion(serve):
    server = serve(lambda p, request, n: {"scores": [{"id": i["id"], "score": None} for i in request["items"]]})
    assert torch.isnan(http(server.url)(PROMPTS, IMAGES)).all()


def raw(body, status=200, **headers):
    body = body if isinstance(body, bytes) else body.encode()
    return lambda path, request, number: (status, headers, body)


SCORED = '{"scores": [{"id": "0", "score": 1.0}, {"id": "1", "score": %s}]}'


class _Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/fdfo_pickle_was_loaded"),))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raw("<html>no</html>", **{"Content-Type": "text/html"}), "takes plain application/json.*<html>no"),
        (raw(SCORED % "1.0", **{"Content-Type": "text/plain"}), "takes plain application/json"),
        (raw(SCORED[:30]), "no JSON.*scores"),
        (raw(""), "no JSON"),
        (raw(SCORED % "NaN"), "NaN is no JSON"),
        (raw(SCORED % "Infinity"), "Infinity is no JSON"),
        (raw(SCORED % "1e999"), r"scores\.1\.score"),
        (raw(SCORED % '"high"'), r"scores\.1\.score"),
        (raw(SCORED % "true"), r"scores\.1\.score"),
        (raw('{"score": [1, 2]}'), "reply scores"),
        (raw("[1, 2]"), "reply"),
        (raw("[" * 100_000), "no JSON"),
        (raw(gzip.compress((SCORED % "1").encode()), **{"Content-Encoding": "gzip"}), "takes plain"),
        (raw(b" " * (5 << 20)), "more than 4 MiB"),
        (raw(pickle.dumps(_Payload())), "no JSON"),
        (raw("not here", status=404), "HTTP 404: not here"),
        (raw("", status=302, Location="http://example.com/"), "HTTP 302"),
        (raw("oh \x1b[31mno", status=500), r"HTTP 500: oh \\x1b\[31mno"),
    ],
)
def test_garbage_costs_the_score_and_is_shown(serve, brisk, capsys, answer, reason):
    server = serve(answer)
    scores = http(server.url)(PROMPTS[:2], IMAGES[:2])
    assert torch.isnan(scores).all()
    error = capsys.readouterr().err
    assert re.search(reason, error), error
    assert "no opinion on 2 images" in error
    assert len(server.requests) <= 6
    assert not Path("/tmp/fdfo_pickle_was_loaded").exists()


def test_one_bad_request_costs_its_own_images_only(serve, brisk):
    def answer(path, request, number):
        bad = any(item["id"] == "2" for item in request["items"])
        return (500, {}, b"this image breaks me") if bad else brightness(path, request, number)

    scores = http(serve(answer).url)(PROMPTS, IMAGES)
    assert torch.isfinite(scores).tolist() == [True, True, False, False, True]


def test_garbage_once_is_asked_again(serve):
    server = serve(lambda p, request, n: (200, {}, b"{") if n == 1 else brightness(p, request, n))
    assert torch.isfinite(http(server.url)(PROMPTS[:2], IMAGES[:2])).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [("0", "1 scores for 2 images"), ("012", "3 scores for 2"), ("02", "ids.*asked for"), ("00", "ids.*asked for")],
)
def test_wrong_counts_and_ids_stop_at_once(serve, ids, message):
    server = serve(lambda *_: {"scores": [{"id": i, "score": 1.0} for i in ids]})
    with pytest.raises(RewardError, match=message):
        http(server.url)(PROMPTS[:2], IMAGES[:2])
    assert len(server.requests) == 1


def test_a_server_that_is_down_stops_before_anything_loads():
    url = f"http://127.0.0.1:{free_port()}/score"
    started = time.monotonic()
    with pytest.raises(RewardError, match=rf"(?s)no use of the reward server {url}.*refused.*curl -sSi {url}") as error:
        WeightedRewards({"mine": (1.0, http(url, give_up_after_s=600.0))}).require_ready()
    assert time.monotonic() - started < 10
    assert error.value.exit_code == 5


def test_a_server_of_another_kind_is_found_out_at_the_start(serve):
    for answer in (raw("<html>", **{"Content-Type": "text/html"}), raw('{"hello": 1}'), raw("", status=404)):
        with pytest.raises(RewardError, match=r"no use of|were not answered"):
            http(serve(answer).url).require_ready()


def test_a_server_that_comes_back_in_time_is_waited_for(serve, brisk, capsys):
    import threading

    port = free_port()
    timer = threading.Timer(0.5, lambda: serve(brightness, port))
    timer.start()
    scores = http(f"http://127.0.0.1:{port}", give_up_after_s=30.0)(PROMPTS, IMAGES)
    timer.join()
    assert torch.isfinite(scores).all()
    assert capsys.readouterr().err.count("trying again") == 1  # one line, not one a retry


def test_a_server_that_stays_away_stops_the_run(brisk, capsys):
    reward = http(f"http://127.0.0.1:{free_port()}", give_up_after_s=0.5, concurrency=4)
    rewards = WeightedRewards({"mine": (1.0, reward)})
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"(?s)refused.*for 0\.5 s.*curl"):
        rewards(PROMPTS, IMAGES)
    assert 0.3 < time.monotonic() - started < 5
    assert capsys.readouterr().err.count("trying again") == 1


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_server_is_waited_for(serve, brisk, status):
    server = serve(lambda p, request, n: (status, {}, b"later") if n < 4 else brightness(p, request, n))
    assert torch.isfinite(http(server.url)(PROMPTS[:2], IMAGES[:2])).all()
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 415, 422, 451])
def test_a_request_that_is_refused_is_not_sent_again(serve, brisk, capsys, status):
    server = serve(raw("not like this", status=status))
    assert torch.isnan(http(server.url)(PROMPTS[:2], IMAGES[:2])).all()
    assert len(server.requests) == 1
    assert f"no opinion on 2 images: HTTP {status}: not like this" in capsys.readouterr().err


def http_date(seconds_ahead):
    return email.utils.formatdate(time.time() + seconds_ahead, usegmt=True)


PAUSES = {
    "7": 7.0, " 12 ": 12.0, "0": 0.0, "9" * 400: 999999999.0, "": 0.0, "-3": 0.0, "soon": 0.0, "1.5": 0.0, "٣": 0.0,
    "Thu, 01 Jan 1970 00:00:00 GMT": 0.0, "Mon, 99 Foo 9999": 0.0, None: 0.0, "1e3": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("header", "seconds"), PAUSES.items())
def test_a_pause_that_a_server_asks_for_is_read(header, seconds):
    assert json_server._retry_after_s(header) == seconds


def test_a_pause_until_a_date_is_read():
    assert 25 <= json_server._retry_after_s(http_date(30)) <= 30


def test_a_pause_that_a_server_asks_for_is_kept(serve, brisk, monkeypatch):
    """The clock that sleeps is replaced: what is asked for is what is slept, at least."""
    pauses = []
    monkeypatch.setattr(json_server, "sleep_using_event", lambda event: pauses.append)
    busy = [(429, {"Retry-After": "3"}, b"later"), (503, {"Retry-After": http_date(60)}, b"later"), (503, {}, b"later")]
    server = serve(lambda p, request, n: busy[n - 1] if n <= 3 else brightness(p, request, n))
    assert torch.isfinite(http(server.url, give_up_after_s=600.0)(PROMPTS[:2], IMAGES[:2])).all()
    assert pauses[0] >= 3.0
    assert pauses[1] >= 55.0
    assert pauses[2] < 1.0


def test_a_pause_beyond_the_runs_patience_is_not_waited_for(serve, brisk):
    server = serve(raw("later", status=503, **{"Retry-After": "4000"}))
    with pytest.raises(RewardError, match="HTTP 503"):
        http(server.url, give_up_after_s=30.0)(PROMPTS[:1], IMAGES[:1])
    assert len(server.requests) == 1


def test_a_hung_server_stops_the_run(serve, brisk):
    server = serve(lambda *_: time.sleep(1.0))
    with pytest.raises(RewardError, match="timed out"):
        http(server.url, timeout_s=0.1, give_up_after_s=0.3)(PROMPTS[:1], IMAGES[:1])


def test_a_reply_that_drips_in_is_cut_off(brisk):
    """Each byte comes in time, the whole does not."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        reward = http(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5, give_up_after_s=0.0)
        import threading

        def drip():
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
            try:
                for _ in range(50):
                    connection.sendall(b" ")
                    time.sleep(0.05)
            except OSError:
                pass
            connection.close()

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(RewardError, match="longer than timeout_s"):
            reward(PROMPTS[:1], IMAGES[:1])
        thread.join()


def test_a_wrong_key_stops_at_once(serve):
    server = serve(raw("who are you", status=401))
    with pytest.raises(RewardError, match="FDFO_REWARD_KEY"):
        http(server.url)(PROMPTS[:1], IMAGES[:1])
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host:80", "http://", "gopher://x"])
def test_only_http_is_spoken(url):
    with pytest.raises(UsageError, match=r"rewards\.0\.url: takes http://host"):
        build("http", {"url": url}, "rewards.0.name")


def test_nothing_on_the_reward_path_unpickles():
    for file in Path(fdfo_engine.rewards.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|dill|joblib)", text, re.MULTILINE), file
        assert text.count("torch.load(") == text.count("weights_only=True"), file


# A server with OpenAI's API


def test_the_score_is_that_of_the_logits(serve):
    def answer(path, request, number):
        assert path == "/v1/chat/completions"
        text = request["messages"][0]["content"][1]["text"]
        index = int(re.search(r"prompt (\d)", text).group(1))
        return completion(Yes=-0.5 * index - 0.1, No=-1.0, Maybe=-9.0)

    server = serve(answer)
    scores = vlm_server(server.url, concurrency=3, image_size=112, extra={"seed": 5})(PROMPTS, IMAGES)
    expected = [100 / (1 + math.exp(-(-0.5 * i - 0.1 + 1.0))) for i in range(5)]
    assert (scores - torch.tensor(expected)).abs().max() < 1e-4
    request = server.requests[0]
    asked = {key: request[key] for key in ("model", "max_tokens", "logprobs", "top_logprobs", "seed")}
    assert asked == {"model": "eye", "max_tokens": 1, "logprobs": True, "top_logprobs": 20, "seed": 5}
    picture, question = request["messages"][0]["content"]
    prefix, _, data = picture["image_url"]["url"].partition("base64,")
    assert prefix == "data:image/png;"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (140, 84)  # of 14 x 9
    assert "<script>" in question["text"]
    assert "{x} %s" in question["text"]


def test_it_agrees_with_the_local_model(serve, tmp_path):
    """The fake server answers with a real tiny model's own log-probabilities of the image it was sent."""
    from rewards.tiny_vlm import WORDS, build_tiny_llava
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = str(build_tiny_llava(tmp_path))
    network, processor = LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)

    def answer(path, request, number):
        picture, question = request["messages"][0]["content"]
        image = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])))
        chat = [{"role": "user", "content": [{"type": "image"}, question]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=text, images=image, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logprobs = network.eval()(**inputs).logits[0, -1].double().log_softmax(-1)
        return completion(**{word: logprobs[i].item() for i, word in enumerate(WORDS)})

    prompts, images = ["red circle", "blue", "so so so"], torch.rand(3, 3, 56, 56)
    local = build("vlm", {"model": folder, "image_size": 56, "dtype": "float32"}, "x")(prompts, images)
    assert (vlm_server(serve(answer).url)(prompts, images) - local).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion(No=-0.1, Maybe=-3.0), "'Yes' not among the answer's tokens: 'No', 'Maybe'"),
        (completion(yes=-0.1, no=-3.0), "'Yes' and 'No' not among"),
        ({"choices": [{"logprobs": None}]}, "no log-probabilities"),
        ({"choices": []}, "no log-probabilities"),
        ({"choices": [{"logprobs": {"content": []}}]}, "no log-probabilities"),
        (completion(Yes="high", No=-3.0), "no log-probabilities"),
        ((200, {}, b'{"choices": [{"logprobs": NaN}]}'), "NaN is no JSON"),
        ((500, {}, b"CUDA error"), "HTTP 500: CUDA error"),
        ((400, {}, b"image too large"), "HTTP 400: image too large"),
    ],
)
def test_an_answer_that_tells_nothing_is_no_opinion(serve, brisk, capsys, reply, reason):
    def answer(path, request, number):
        return reply if "prompt 1 " in str(request) else completion(Yes=-0.1, No=-2.0)

    scores = vlm_server(serve(answer).url)(PROMPTS, IMAGES)
    assert torch.isfinite(scores).tolist() == [True, False, True, True, True]
    assert reason in capsys.readouterr().err


def test_the_server_must_have_the_model(serve):
    models = {"object": "list", "data": [{"id": "ear", "object": "model"}, {"id": "nose"}]}
    server = serve(lambda path, request, number: models if path == "/v1/models" else completion(Yes=-0.1, No=-2.5))
    with pytest.raises(RewardError, match="has no model 'eye'; it has ear, nose"):
        vlm_server(server.url).require_ready()
    vlm_server(server.url, model="nose").require_ready()
    with pytest.raises(RewardError, match="curl"):
        vlm_server(f"http://127.0.0.1:{free_port()}").require_ready()


def test_requests_run_side_by_side_within_the_bound(serve):
    import threading

    lock, now, most = threading.Lock(), 0, 0

    def answer(path, request, number):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.05)
        with lock:
            now -= 1
        return completion(Yes=-1.0, No=-2.0)

    vlm_server(serve(answer).url, concurrency=3)([PROMPTS[0]] * 9, IMAGES[:1].expand(9, -1, -1, -1))
    assert most == 3
