"""The page against the real HTTP side of a server, without an engine: who may ask, and what an answer does."""

import re
import threading
import time
from pathlib import Path

import pytest
from label.paired import PairedRun
from starlette.testclient import TestClient

from fdfo_engine.label import page as page_module
from fdfo_engine.label.server import PageDoor
from fdfo_engine.runtime.errors import UsageError

HOST = "http://127.0.0.1:8720"
OWN = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def run(tmp_path):
    run = PairedRun(tmp_path)
    yield run
    run.close()


@pytest.fixture
def browser(run):
    """A client of the page that sends what a browser sends; not signed in."""
    with TestClient(run.page().application(), base_url=HOST, headers=OWN, raise_server_exceptions=False) as client:
        yield client


def enter(browser, run, rater="owner", role="owner"):
    response = browser.post("/api/session", json={"word": run.word(rater, role)})
    assert response.status_code == 204, response.text
    return response


def label(browser, name, pair, choice="left", **more):
    body = {"round": name, "pair_id": pair, "choice": choice, "ms": 900, **more}
    return browser.post("/api/label", json=body)


def events(run, name):
    return run.backend.rounds.events(name)


# ---- who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": HOST}, 200),
        ({"Origin": HOST}, 200),  # a browser without Sec-Fetch-Site
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:8721"}, 403),
        ({}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Host": "evil.example"}, 403),
    ],
)
def test_row_csrf_from_another_site(run, headers, status):
    """Label page, CSRF: what changes something comes from this page alone."""
    name = run.add_round()
    pair = run.backend.rounds.pairs(name)[0].pair
    with TestClient(run.page().application(), base_url=HOST, raise_server_exceptions=False) as client:
        client.cookies.set(run.passes.cookie, run.word())
        body = {"round": name, "pair_id": pair, "choice": "left", "ms": 900}
        assert client.post("/api/label", json=body, headers=headers).status_code == status
    assert len(events(run, name)) == (status == 200)


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(run, browser):
    cookie = enter(browser, run).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert run.backend.token.lower() not in cookie


@pytest.mark.parametrize(("old", "new"), [("ann", "bob"), ("rater", "owner"), ("~", ""), ("ann", "ann~"), ("a", "ä")])
def test_a_word_is_for_one_person_and_role(run, browser, old, new):
    response = browser.post("/api/session", json={"word": run.word("ann", "rater").replace(old, new, 1)})
    assert response.status_code in (401, 422)
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize("path", ["/api/state", "/api/round", "/img/" + "0" * 32])
def test_nothing_is_told_without_a_session(browser, path):
    assert browser.get(path).status_code == 401


def test_a_rater_only_judges(run, browser):
    enter(browser, run, "ann", "rater")
    bodies = {"train": {"round": "r1"}, "compare": {}, "next": {}, "again": {}, "link": {"name": "x"}}
    for path, body in bodies.items():
        assert browser.post(f"/api/{path}", json=body).status_code == 403, path


def test_an_invited_rater_comes_in_by_the_link(run, browser):
    enter(browser, run)
    link = browser.post("/api/link", json={"name": "ann"}).json()["link"]
    browser.cookies.clear()
    assert browser.post("/api/session", json={"word": link.split("#")[1]}).status_code == 204
    assert browser.get("/api/state").json()["rater"] == "ann"


# ---- the files


def test_row_xss_policy_and_a_page_without_inline_script(run, browser):
    """Label page, XSS: a strict policy, and nothing in the page that it would have to allow."""
    response = browser.get("/")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["img-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", response.text)
    scripts = "".join(path.read_text() for path in (page_module.FOLDER / "static").glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", scripts)


def test_every_file_the_page_names_is_there(browser):
    text = browser.get("/").text
    names = set(re.findall(r'"(/static/[^"]+)"', text))
    for script in (page_module.FOLDER / "static").glob("*.js"):
        names |= {f"/static/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    assert len(names) >= 7
    for name in names:
        response = browser.get(name)
        assert response.status_code == 200, name
        assert response.headers["x-content-type-options"] == "nosniff"


STRANGE_NAMES = (
    "../../etc/passwd", "%2e%2e/%2e%2e/serve.token", "..%2f..%2fserve.token", "/etc/passwd", "%00", "main.js%00.png",
    "....//serve.token", "..\\serve.token", "a" * 5000, "0" * 31 + "%0a", "%ff", "main.js/..", ".", "..", "%252e%252e",
)  # fmt: skip


def test_row_path_traversal(run, browser):
    """Label page, path traversal: images by an opaque id, files out of a dict; no path is ever joined."""
    enter(browser, run)
    for folder in ("/img/", "/static/"):
        for name in STRANGE_NAMES:
            response = browser.get(folder + name)
            assert response.status_code == 404 or response.url.path == "/", folder + name
            assert run.backend.token not in response.text


def test_row_bind_address():
    """Label page, bind address: loopback by default, anything else only when it is asked for, with the tunnel told."""
    with PageDoor(port=0).bound() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.168.0.7"):
        with pytest.raises(UsageError, match="ssh -L"):
            PageDoor(host=host).check()
        PageDoor(host=host, allow_remote=True).check()


# ---- answers


def test_an_answer_is_on_disk_and_taken_back(run, browser):
    enter(browser, run)
    name = run.add_round()
    first = browser.get("/api/round").json()["due"][0] if settled(browser, name) else None
    event = label(browser, name, first["pair_id"], "left", flips=2, zooms=1).json()["event"]
    (opinion,) = events(run, name)
    assert (opinion.event, opinion.rater, opinion.details["choice"]) == (event, "owner", "left")
    assert (opinion.details["ms"], opinion.details["flips"], opinion.details["zooms"]) == (900, 2, 1)
    left = run.backend.shown(run.backend.rounds.pairs(name)[0], "owner")[0]
    assert opinion.rewards[left] == 1.0
    assert browser.post("/api/undo", json={"round": name, "event": event}).status_code == 200
    again = browser.get("/api/round").json()
    assert (again["due"][0]["pair_id"], again["due"][0]["attempt"]) == (first["pair_id"], 1)
    assert again["answers"] == []


def settled(browser, name):
    """Once the page has seen the round."""
    deadline = time.monotonic() + 30
    while (browser.get("/api/state").json()["round"] or {}).get("id") != name:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_repeat_shows_the_sides_swapped_and_counts_as_such(run, browser):
    enter(browser, run)
    name = run.add_round(12)
    assert settled(browser, name)
    due = browser.get("/api/round").json()["due"]
    again = next(pair for pair in due if pair["repeat"])
    first = next(pair for pair in due if pair["pair_id"] == again["pair_id"])
    assert (first["left"], first["right"]) == (again["right"], again["left"])
    label(browser, name, first["pair_id"], "left")
    label(browser, name, first["pair_id"], "right", repeat=True)
    one, other = events(run, name)
    assert one.rewards == other.rewards
    steady = browser.get("/api/state").json()["mine"]["steady"]
    assert (steady["count"], steady["total"]) == (1, 1)


@pytest.mark.parametrize("second", ["left", "right"])
def test_row_double_click(run, browser, second):
    """Label page, double click, key repeat, replayed request: one label for each showing; a second one is a no-op."""
    enter(browser, run)
    name = run.add_round()
    pair = run.backend.rounds.pairs(name)[0].pair
    answers = []

    def press(choice, ms):
        answers.append(label(browser, name, pair, choice, ms=ms).json()["event"])

    threads = [threading.Thread(target=press, args=(c, ms)) for c, ms in (("left", 900), (second, 950), (second, 990))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events(run, name)) == 1
    assert len(set(answers)) == 1


def test_a_replayed_request_does_not_undo_the_undo(run, browser):
    enter(browser, run)
    name = run.add_round()
    pair = run.backend.rounds.pairs(name)[0].pair
    event = label(browser, name, pair).json()["event"]
    browser.post("/api/undo", json={"round": name, "event": event})
    assert label(browser, name, pair).json()["event"] == event
    assert run.backend.rounds.opinions(name) == []
    label(browser, name, pair, "right", attempt=1)
    assert len(run.backend.rounds.opinions(name)) == 1


@pytest.mark.parametrize(
    ("what", "status", "words"),
    [
        ("finished", 409, "trained"), ("sealed", 409, "sealed"), ("unknown pair", 404, "no pair"),
        ("unknown round", 404, "there is none"), ("somebody else's", 404, "no such answer"),
    ],
)  # fmt: skip
def test_row_label_for_a_finished_round_unknown_pair_or_somebody_elses(run, browser, what, status, words):
    """Label page, labels out of place: refused with a text; the page then reads the round anew."""
    name = run.add_round()
    pair = run.backend.rounds.pairs(name)[0].pair
    if what in ("finished", "sealed"):
        run.backend.rounds.set_round_state(name, "trained" if what == "finished" else "sealed")
    enter(browser, run, "ann", "rater")
    if what == "somebody else's":
        event = label(browser, name, pair).json()["event"]
        enter(browser, run, "bob", "rater")
        response = browser.post("/api/undo", json={"round": name, "event": event})
    else:
        response = label(browser, "r99" if what == "unknown round" else name, 5 if what == "unknown pair" else pair)
    assert (response.status_code, words in response.json()["detail"]) == (status, True), response.text


def test_row_undo_after_the_round_trained(run, browser):
    """Label page, undo after training: refused politely, with the reason."""
    enter(browser, run)
    name = run.add_round()
    event = label(browser, name, run.backend.rounds.pairs(name)[0].pair).json()["event"]
    run.backend.rounds.set_round_state(name, "trained")
    response = browser.post("/api/undo", json={"round": name, "event": event})
    assert response.status_code == 409
    assert response.json()["detail"] == f"round {name} is trained: its feedback cannot change any more"
    assert len(run.backend.rounds.opinions(name)) == 1


def test_row_label_store_full(run, browser):
    """Label page, store full: 507, and what was acknowledged is there, no more and no less."""
    enter(browser, run)
    name = run.add_round(60)
    with run.database.transaction() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    run.database._db.execute(f"PRAGMA max_page_count = {pages}")  # as a full disk: it ends a transaction by itself
    answers = {pair.pair: label(browser, name, pair.pair) for pair in run.backend.rounds.pairs(name)}
    refused = [answer.json()["code"] for answer in answers.values() if answer.status_code == 507]
    assert set(refused) == {"storage"}
    acknowledged = [pair for pair, answer in answers.items() if answer.status_code == 200]
    assert len(acknowledged) + len(refused) == 60
    assert [opinion.pair for opinion in run.backend.rounds.opinions(name)] == acknowledged


def test_row_label_store_corrupt(tmp_path):
    """Label page, store corrupt: 507."""
    run = PairedRun(tmp_path)
    name = run.add_round()
    pair = run.backend.rounds.pairs(name)[0].pair
    run.close()
    with run.database.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (run.database.path.stat().st_size - 4096))
    damaged = PairedRun(tmp_path)
    with TestClient(damaged.page().application(), base_url=HOST, headers=OWN) as browser:
        enter(browser, damaged)
        response = label(browser, name, pair)
    assert (response.status_code, response.json()["code"]) == (507, "storage")
    damaged.close()


def test_row_image_unreadable(run, browser):
    """Label page, image gone: 410; the pair stays among those that wait."""
    enter(browser, run)
    name = run.add_round()
    image = run.backend.rounds.pairs(name)[0].images[0]
    assert browser.get(f"/img/{image}").headers["content-type"] == "image/png"
    whole = run.image_file(image).read_bytes()
    for content in (whole[:-5], b"", b"no picture"):  # half written: no browser keeps it, nor that it was gone
        run.image_file(image).write_bytes(content)
        response = browser.get(f"/img/{image}")
        assert (response.status_code, response.headers["cache-control"]) == (410, "no-store")
    run.image_file(image).unlink()
    assert browser.get(f"/img/{image}").status_code == 410
    assert settled(browser, name)
    assert image in str(browser.get("/api/round").json()["due"])


def test_the_engine_is_away(run, browser):
    enter(browser, run)
    name = run.add_round()
    (Path(run.folder) / "serve.json").unlink()
    response = label(browser, name, run.backend.rounds.pairs(name)[0].pair)
    assert (response.status_code, response.json()["code"]) == (503, "engine_away")
    assert "nothing was recorded" in response.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'{"round": "r1"}', b'{"round": "../x", "pair_id": 1, "choice": "left", "ms": 1}',
        b'{"round": "r1", "pair_id": 1, "choice": "best", "ms": 1}', b"x" * 20000,
    ],
)  # fmt: skip
def test_a_strange_body_is_a_readable_problem(run, browser, body):
    enter(browser, run)
    response = browser.post("/api/label", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (413, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_a_comparison_is_told_with_its_interval_and_p(run, browser):
    enter(browser, run)
    name = run.add_round(6, kind="compare")
    assert settled(browser, name)
    for place, pair in enumerate(run.backend.rounds.pairs(name)):
        tuned = "left" if run.backend.shown(pair, "owner")[0] == 1 else "right"
        label(browser, name, pair.pair, "tie" if place == 5 else tuned)
    result = browser.get("/api/state").json()["comparison"]
    assert (result["wins"], result["losses"], result["ties"]) == (5, 0, 1)
    assert result["rate"]["value"] == 1.0
    assert result["p"] == pytest.approx(2 / 2**5)
    assert browser.post("/api/train", json={"round": name}).status_code == 409
