"""The page in headless Chromium: what a person sees and presses, first without an engine, then with a real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from engine.launching import environment
from label.paired import PairedRun, listening
from serve.serving import settings

from fdfo_engine.choices import wilson
from fdfo_engine.label.access import Passes, Session
from fdfo_engine.label.server import PAGE_NAME
from fdfo_engine.serve.access import token_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_MS = 300_000
DESKTOP, TABLET = {"width": 1400, "height": 900}, {"width": 820, "height": 1180}


@pytest.fixture
def run(tmp_path):
    run = PairedRun(tmp_path)
    yield run
    run.close()


@contextmanager
def opened(chromium, url, *, patience_ms=PATIENCE_MS, **options):
    """A tab at `url`; whatever its console says against the page fails the test."""
    context = chromium.new_context(**{"viewport": DESKTOP, **options})
    tab, complaints = context.new_page(), []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda line: complaints.append(line.text) if "Security Policy" in line.text else None)
    tab.set_default_timeout(patience_ms)
    tab.goto(url)
    yield tab
    context.close()
    assert not complaints


@contextmanager
def at_the_desk(chromium, run, **options):
    """The page of a run without an engine, with a round to label."""
    with listening(run.engine) as engine:
        (run.folder / "serve.json").write_text(json.dumps({"url": engine}))
        with (
            listening(run.page(httpx.AsyncHTTPTransport()).application()) as url,
            opened(chromium, f"{url}/#{run.word()}", patience_ms=60_000, **options) as tab,
        ):
            labelling(tab)
            yield tab


def labelling(tab):
    tab.wait_for_function("() => document.body.dataset.scene === 'labelling' && document.querySelector('.picture img')")


def count(tab):
    """Answers that the page shows as recorded."""
    return int(tab.inner_text("#round-count").split()[0])


def press(tab, key):
    """A key, and the answer that the page then shows as recorded."""
    before = count(tab)
    tab.keyboard.press(key)
    tab.wait_for_function(
        "before => document.getElementById('frames').ariaBusy !== 'true' &&"
        " (document.body.dataset.scene !== 'labelling'"
        " || parseInt(document.getElementById('round-count').textContent) > before)",
        arg=before,
    )


def shown_image(tab):
    side = tab.evaluate("() => document.body.dataset.shown")
    return tab.get_attribute(f".frame[data-side={side}] img", "src")


# ---- without an engine


def test_keys_choose_flip_zoom_undo_and_skip(chromium, run):
    name = run.add_round(4)
    with at_the_desk(chromium, run) as tab:
        assert "#" not in tab.url  # the link's word is gone from the address
        left = shown_image(tab)
        tab.keyboard.down("f")
        assert shown_image(tab) != left
        tab.keyboard.up("f")
        assert shown_image(tab) == left
        tab.keyboard.press("z")
        assert tab.evaluate("() => 'zoomed' in document.body.dataset")
        press(tab, "ArrowLeft")
        (opinion,) = run.backend.rounds.events(name)
        assert (opinion.details["choice"], opinion.details["flips"], opinion.details["zooms"]) == ("left", 1, 1)
        press(tab, "ArrowDown")
        press(tab, "s")
        for wanted in (2, 1, 0):
            tab.keyboard.press("Backspace")
            tab.wait_for_function("n => parseInt(document.getElementById('round-count').textContent) === n", arg=wanted)
        assert run.backend.rounds.opinions(name) == []
        assert shown_image(tab) == left
        for key in ("ArrowRight", " ", "s", "ArrowLeft"):
            press(tab, key)
        choices = [opinion.details["choice"] for opinion in run.backend.rounds.opinions(name)]
        assert choices == ["right", "tie", "skip", "left"]
        assert "All pairs of this round are answered" in tab.inner_text("#card-title")


def test_the_next_two_pairs_are_loaded_before_they_are_due(chromium, run):
    name = run.add_round(5)
    pairs = run.backend.rounds.pairs(name)
    with at_the_desk(chromium, run) as tab:
        tab.wait_for_load_state("networkidle")
        loaded = tab.evaluate("() => performance.getEntriesByType('resource').map(entry => entry.name)")
        ahead = [any(image in url for url in loaded) for pair in pairs for image in pair.images]
        assert ahead == [True] * 6 + [False] * 4


def test_row_label_store_full_is_seen(chromium, run):
    """Label page, store full: the key press is not acknowledged on screen, and the same pair stays."""
    name = run.add_round(40)
    with at_the_desk(chromium, run) as tab:
        with run.database.transaction() as db:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
        run.database._db.execute(f"PRAGMA max_page_count = {pages}")
        while tab.is_hidden("#banner"):
            before, image = count(tab), shown_image(tab)
            tab.keyboard.press("ArrowLeft")
            tab.wait_for_function(
                "before => !document.getElementById('banner').hidden"
                " || parseInt(document.getElementById('round-count').textContent) > before",
                arg=before,
            )
        assert "not recorded" in tab.inner_text("#banner")
        assert (count(tab), shown_image(tab)) == (before, image)
        assert len(run.backend.rounds.events(name)) == before
        run.database._db.execute("PRAGMA max_page_count = 100000")
        press(tab, "ArrowLeft")
        assert tab.is_hidden("#banner")


def test_row_image_unreadable_is_seen(chromium, run):
    """Label page, image gone: a placeholder; skip puts the pair back, and nothing is recorded of it."""
    name = run.add_round(3)
    broken = run.backend.rounds.pairs(name)[0]
    run.image_file(broken.images[1]).write_bytes(b"no picture")
    with at_the_desk(chromium, run) as tab:
        assert "cannot be shown" in tab.inner_text(".frames")
        tab.keyboard.press("ArrowLeft")  # no answer to what was not seen
        tab.keyboard.press("s")
        tab.wait_for_function("() => !document.querySelector('.frames').textContent.includes('cannot be shown')")
        press(tab, "ArrowLeft")
        press(tab, "ArrowRight")
        assert broken.pair not in [opinion.pair for opinion in run.backend.rounds.events(name)]
        assert "Pairs with an image that cannot be shown: 1." in tab.inner_text("#card-text")
        run.image_file(broken.images[1]).write_bytes(run.image_file(broken.images[0]).read_bytes())
        tab.reload()
        labelling(tab)
        press(tab, "ArrowLeft")
        assert len(run.backend.rounds.opinions(name)) == 3


def test_row_xss_in_a_prompt(chromium, tmp_path):
    """Label page, XSS: whatever stands in a prompt, a question or a meaning is text."""
    nasty = "<img src=x onerror=alert(1)><script>document.title='owned'</script>\"'&amp;\u202e"
    run = PairedRun(tmp_path, f"labels.question={json.dumps(nasty)}", "labels.tie=<b>tie</b>")
    run.add_round(2, prompt=nasty)
    with at_the_desk(chromium, run) as tab:
        assert tab.text_content("#prompt") == nasty
        assert tab.text_content("#question") == nasty
        assert "<b>tie</b>" in tab.text_content("#tie")
        assert tab.locator("#prompt *, #question *, script:not([src])").count() == 0
        assert nasty in tab.get_attribute(".frame[data-side=left] img", "alt")
        assert "owned" not in tab.title()
    run.close()


def test_row_double_click_is_one_answer(chromium, run):
    """Label page, double click and key repeat: one answer."""
    name = run.add_round(4)
    with at_the_desk(chromium, run) as tab:
        tab.dblclick(".choice[data-choice=left]")
        tab.wait_for_function("() => parseInt(document.getElementById('round-count').textContent) >= 1")
        events = run.backend.rounds.events(name)
        assert len({event.pair for event in events}) == len(events)
        tab.keyboard.down("ArrowRight")
        for _ in range(20):
            tab.keyboard.down("ArrowRight")  # the same key again without an end: as the keyboard repeats it
        tab.keyboard.up("ArrowRight")
        tab.wait_for_timeout(300)
        assert len(run.backend.rounds.events(name)) <= len(events) + 1


def test_row_undo_after_sealing_is_refused_politely(chromium, run):
    """Label page, undo after training: the page says why, and reads the round anew."""
    name = run.add_round(4)
    with at_the_desk(chromium, run) as tab:
        press(tab, "ArrowLeft")
        run.backend.rounds.set_round_state(name, "trained")
        tab.keyboard.press("Backspace")
        tab.wait_for_selector("#banner:not([hidden])")
        assert "cannot change any more" in tab.inner_text("#banner")
        assert len(run.backend.rounds.opinions(name)) == 1


def test_two_windows_of_one_rater_do_not_double_an_answer(chromium, run):
    name = run.add_round(3)
    with at_the_desk(chromium, run) as tab:
        other = tab.context.new_page()
        other.goto(tab.url)
        labelling(other)
        press(tab, "ArrowLeft")
        press(other, "ArrowRight")
        first = run.backend.rounds.pairs(name)[0].pair
        assert [event.pair for event in run.backend.rounds.events(name)] == [first]


@pytest.mark.parametrize("width", [1400, 768, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_on_the_screen(chromium, run, width, scheme):
    run.add_round(4, prompt="a red circle left of " + "a blue square and " * 12)
    viewport = {"width": width, "height": 900 if width > 400 else 844}
    with at_the_desk(chromium, run, viewport=viewport, color_scheme=scheme) as tab:
        assert tab.evaluate("() => document.documentElement.scrollWidth") <= width
        for choice in ("left", "tie", "right"):
            box = tab.locator(f".choice[data-choice={choice}]").bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= viewport["height"]
            assert box["height"] >= 44


# ---- with a real engine


class Labelled:
    """`fdfo label --config shapes` in a process of its own: the page, and the engine that it starts."""

    def __init__(self, folder, *more):
        self.folder, self.more = folder, more
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def start(self):
        command = [sys.executable, "-m", "fdfo_engine.cli.main", "label", "--config", "shapes", "--port", "0"]
        (self.folder / PAGE_NAME).unlink(missing_ok=True)
        with (self.folder.parent / "label.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--no-browser", *settings(self.folder, "run.epochs=1000", *self.more)],
                stdout=log, stderr=log, env=environment(FDFO_CHOSEN_PORT=""),
            )  # fmt: skip

    @property
    def link(self):
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not (self.folder / PAGE_NAME).is_file():
            assert self.process.poll() is None, (self.folder.parent / "label.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        url = json.loads((self.folder / PAGE_NAME).read_text())["url"]
        return f"{url}/#{Passes(token_of(self.folder)).word(Session('owner', 'owner'))}"

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(240) in (0, 75), (self.folder.parent / "label.log").read_text()


@pytest.fixture
def labelled(tmp_path):
    with Labelled(tmp_path / "run", "labels.round_size=12", "labels.strip=2", "labels.comparison=4") as labelled:
        yield labelled


def epochs_of(folder):
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def round_name(tab):
    return tab.inner_text("#round-name")


def next_round(tab, number):
    tab.wait_for_function("n => document.getElementById('round-name').textContent === `Round ${n}`", arg=number)
    labelling(tab)


def test_two_rounds_by_keyboard_against_a_real_engine(chromium, labelled):
    """Must show 1: labels two full rounds by keyboard only, sees training happen and the next pairs arrive."""
    with opened(chromium, labelled.link) as tab:
        for number in (1, 2):
            next_round(tab, number)
            answers = 0
            while tab.evaluate("() => document.body.dataset.scene") == "labelling":
                tab.keyboard.down("f")
                tab.keyboard.up("f")
                press(tab, ["ArrowLeft", "ArrowRight", "ArrowDown"][answers % 3])
                answers += 1
            assert answers == 13  # twelve pairs, and one of them again
            tab.keyboard.press("Enter")
            tab.wait_for_function("() => /Training on your choices|Drawing/.test(document.body.innerText)")
        next_round(tab, 3)
        assert epochs_of(labelled.folder) == [1, 2]
        tab.wait_for_function("() => document.querySelectorAll('#strip td').length === 6")
        assert tab.inner_text("#strip tr").split() == ["start", "round", "1", "round", "2"]


def test_early_finish_and_the_blind_comparison(chromium, labelled):
    with opened(chromium, labelled.link) as tab:
        next_round(tab, 1)
        for key in ("ArrowLeft", "ArrowLeft", "ArrowRight"):
            press(tab, key)
        tab.click("#train-early")
        assert "Train on these 3 choices now?" in tab.inner_text("#confirm")
        tab.click("#confirm button[value=yes]")
        next_round(tab, 2)
        tab.click("#compare")
        tab.wait_for_function("() => document.getElementById('round-name').textContent === 'Comparison'")
        labelling(tab)
        for _ in range(4):
            press(tab, "ArrowLeft")
        tab.wait_for_function("() => document.getElementById('card-title').textContent.startsWith('The trained model')")
        tab.wait_for_function(
            "() => /: ([1-4] to [0-4]|0 to [1-4]), with 0 ties/.test(document.getElementById('card-text').textContent)"
        )
        told = tab.inner_text("#card-text")
        share = wilson(int(re.search(r"(\d) to \d, with", told)[1]), 4)
        assert f"{round(100 * share.low)} to {round(100 * share.high)} %" in told
        tab.keyboard.press("Enter")
        next_round(tab, 2)


def test_a_round_by_touch_at_tablet_size(chromium, labelled):
    """Must show 1: one round by touch; pressing the image flips it."""
    with opened(chromium, labelled.link, viewport=TABLET, has_touch=True, is_mobile=True) as tab:
        next_round(tab, 1)
        left = shown_image(tab)
        box = tab.locator(".picture").first.bounding_box()
        touch = tab.context.new_cdp_session(tab)
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
        tab.wait_for_function("() => document.body.dataset.shown === 'right'")
        assert shown_image(tab) != left
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        tab.wait_for_function("() => document.body.dataset.shown === 'left'")
        while tab.evaluate("() => document.body.dataset.scene") == "labelling":
            before = count(tab)
            tab.tap(".choice[data-choice=left]")
            tab.wait_for_function(
                "before => document.body.dataset.scene !== 'labelling'"
                " || parseInt(document.getElementById('round-count').textContent) > before",
                arg=before,
            )
        tab.tap("#card-actions .main")
        next_round(tab, 2)
        assert epochs_of(labelled.folder) == [1]


def test_the_page_survives_its_own_kill_and_the_engines(chromium, labelled):
    with opened(chromium, labelled.link) as tab:
        next_round(tab, 1)
        press(tab, "ArrowLeft")
        engine = json.loads((labelled.folder / "serve.json").read_text())["pid"]
        os.kill(engine, signal.SIGKILL)
        tab.keyboard.press("ArrowRight")
        tab.wait_for_selector("#banner:not([hidden])")
        assert "nothing was recorded" in tab.inner_text("#banner")
        assert count(tab) == 1
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while count(tab) == 1 and time.monotonic() < deadline:
            tab.keyboard.press("ArrowRight")
            tab.wait_for_timeout(500)
        assert count(tab) == 2
        labelled.process.kill()
        labelled.process.wait()
    labelled.start()
    with opened(chromium, labelled.link) as tab:
        next_round(tab, 1)
        assert count(tab) == 2
