import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from fdfo_engine.report import write_report
from fdfo_engine.report.curves import Series, line_chart, short, smoothed, stacked_chart, ticks
from fdfo_engine.runtime import events
from fdfo_engine.runtime.environment import describe_environment
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.runtime.run_folder import RunFolder
from fdfo_engine.runtime.run_log import RunLog
from fdfo_engine.runtime.run_pictures import RunPictures, evaluation_images, pairs_grid

CONFIG = """
run: {dir: runs/x, seed: 7, epochs: 12}
model: {id: tiny/shapes, train: lora, height: 32, width: 48}
rewards: [{name: strict, weight: 1.0}, {name: color, weight: 0.1}]
optimizer: {lr: 1.0e-4}
"""
NASTY = [
    "<script>alert('x')</script>", "\x1b[31mred\x00", "{} %s {{ 7 * 7 }}", "../../etc/passwd", "😀" * 5000,
    '"><img src=https://evil.example/x onerror=alert(1)>', "https://evil.example/a.png", "line\nbreak", "\ud800",
]  # fmt: skip
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return "".join(self.text)


def metrics(epoch):
    return {
        "epoch": epoch, "pairs": 32, "reward_mean": 0.2 + epoch / 30, "reward_std": 0.3, "reward_strict_mean": 0.1,
        "reward_<b>_mean": 0.5, "advantage_abs_mean": 0.1 + epoch / 99, "tied_pairs": epoch % 4, "lost_pairs": 1,
        "zero_direction_pairs": 0, "loss": -0.01 * epoch, "log_ratio_mean": 1e-4 * epoch,
        "log_ratio_floor": 1e-9 * epoch, "clip_fraction": 0.02 + epoch / 999, "grad_norm": 0.7 + epoch / 99,
        "skipped_steps": epoch // 9, "optimizer_steps": 4, "kl": float("nan"), "images_per_second": 5.0,
        "seconds_rollout": 3.0, "seconds_reward": 1.0, "seconds_update": 6.0, "seconds_total": 10.5,
        "first_pair": 32 * epoch, "lr": 1e-4 / epoch,
    }  # fmt: skip


def logging(folder):
    return EventStream([RunLog(folder, tensorboard=False), RunPictures(folder)])


def evaluate(log, epoch):
    for weights, offset in (("raw", 0.0), ("ema", 0.05)):
        record = {"epoch": epoch, "count": 64, "seed": 0, "weights": weights, "metrics_stderr": {"strict": 0.03}}
        values = record | {"metrics": {"strict": 0.2 + epoch / 20 + offset, "<i>odd</i>": 1.0}}
        log.tell(events.Metrics(epoch=epoch, kind="evaluation", values=values))
    images = torch.rand(len(NASTY), 3, 32, 48)
    log.tell(evaluation_images(epoch, NASTY, images, {"strict": [0.25] * (len(NASTY) - 1) + [float("nan")]}))


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "shapes & more"
    with RunFolder.open(path, CONFIG) as folder:
        log = logging(path)
        evaluate(log, 0)
        for epoch in range(1, 13):
            log.tell(events.Metrics(epoch=epoch, kind="epoch", values=metrics(epoch)))
            if epoch % 4 == 0:
                evaluate(log, epoch)
        log.tell(
            pairs_grid("rollout_epoch_000012", 12, torch.rand(2, 2, 3, 32, 48), ["a", "b"], [[0.1, 0.9], [0.4, 0.4]])
        )
        folder.status.update("finished", exit_code=0, epoch=12, epochs=12)
    return path


def read(path):
    return Page(path.read_text())


def assert_opens_offline(page):
    assert "script" not in page.tags
    assert not {"link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("srcset", "action", "xlink:href"), (tag, name)
        assert name != "href" or (tag == "a" and value.removeprefix("#") in ids), f"{value}: leads out of the page"
        assert name != "src" or value.startswith("data:image/"), value[:80]
        assert name != "style" or "url(" not in value
    policy = dict(a[1:] for a in page.attributes if a[0] == "meta" and a[1] == "content")
    assert any("default-src 'none'" in str(a[2]) for a in page.attributes if a[:2] == ("meta", "content")), policy


def test_a_finished_run(run_dir):
    out = write_report(run_dir)
    assert out == run_dir / "report.html"
    page = read(out)
    assert_opens_offline(page)
    assert page.tags.count("svg") >= 3 + 2 + 8 + 2
    for text in (
        "shapes & more", "finished", "tiny/shapes", "strict x 1.0, color x 0.1", "48 x 32", "Training reward",
        "Evaluation", "Pairs without an opinion", "Gradient norm", "Seconds an epoch", "seed: 7",
        "Same prompt, same seed: epoch 0, 4, 12", describe_environment()["packages"]["torch"],
    ):  # fmt: skip
        assert text in page.words, text
    assert "Not on this page" not in page.words
    assert page.tags.count("img") == 3 * len(NASTY) + 1
    assert "KL term" not in page.words, "a curve without any finite value is left out"


def test_change_between_first_and_last_evaluation(run_dir):
    words = re.sub(r"\s+", " ", read(write_report(run_dir)).words)
    assert "strictema0.25 ±0.030.85 ±0.03+0.60 → 12" in words


def test_nasty_prompts_are_text(run_dir):
    text = write_report(run_dir).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    page = Page(text)
    assert "<script>alert('x')</script>" in page.words
    assert "<i>odd</i>" in page.words
    assert "i" in page.tags, "the legend's own"
    markup = re.sub(r'alt="[^"]*"', "", re.sub(r">[^<]*<", "><", text))
    assert not re.search(r"""(src|href|url)\s*=?\s*["'(]?\s*(https?:)?//""", markup)


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    with RunFolder.open(tmp_path / "x", CONFIG) as folder:
        folder.status.update("running")
        page = read(write_report(tmp_path / "x", tmp_path / "out.html"))
    assert_opens_offline(page)
    for text in ("running", "no training curves", "No evaluation was recorded", "No evaluation pictures"):
        assert text in page.words, text
    assert "svg" not in page.tags


def test_a_failed_run_shows_its_message(run_dir):
    with RunFolder.open(run_dir, CONFIG) as folder:
        folder.status.update("failed", exit_code=5, message="reward 'x' <gone>\ntry curl")
    words = read(write_report(run_dir)).words
    assert "failed" in words
    assert "exit code 5" in words
    assert "reward 'x' <gone>\ntry curl" in words


def test_damaged_pieces_do_not_stop_it(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 13, "rew')
    (run_dir / "status.json").write_text("{")
    (run_dir / "environment.json").write_text("[]")
    (run_dir / "config.yaml").write_text("a: [")
    (run_dir / "images" / "evaluation_epoch_000012" / "003.png").write_bytes(b"no picture")
    (run_dir / "images" / "evaluation_epoch_000004.json").write_text("half")
    page = read(write_report(run_dir))
    assert_opens_offline(page)
    for text in ("unknown", "cannot be read", "1 evaluation pictures", "environment.json", "unreadable"):
        assert text in page.words, text


def test_only_the_run_folder_is_read(run_dir):
    listing = run_dir / "images" / "evaluation_epoch_000012.json"
    (run_dir.parent / "secret.png").write_bytes((run_dir / "images" / "rollout_epoch_000012.png").read_bytes())
    content = json.loads(listing.read_text())
    content["items"][0]["file"] = "../../secret.png"
    listing.write_text(json.dumps(content))
    assert "1 evaluation pictures cannot be read" in read(write_report(run_dir)).words


def test_not_a_run(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_pictures_are_scaled_down(tmp_path):
    with RunFolder.open(tmp_path, CONFIG):
        logging(tmp_path).tell(evaluation_images(0, ["a"], torch.rand(1, 3, 768, 768), {}))
    out = write_report(tmp_path)
    assert "data:image/jpeg" in out.read_text()
    assert out.stat().st_size < 150_000


def test_a_long_run_stays_small(tmp_path):
    with RunFolder.open(tmp_path, CONFIG):
        lines = "".join(json.dumps(metrics(epoch) | {"kl": None}) + "\n" for epoch in range(1, 5001))
        (tmp_path / "metrics.jsonl").write_text(lines)
    assert write_report(tmp_path).stat().st_size < 500_000


def test_curves_leave_gaps():
    svg = line_chart([Series("a", [(0, 1.0), (1, math.nan), (2, 3.0), (3, math.inf), (4, 1.0)])], "a")
    assert svg.count("<polyline") == 3
    assert "nan" not in svg
    assert "inf" not in svg
    assert line_chart([Series("a", [(0, math.nan)])], "a") is None
    assert stacked_chart(["a"], [], "a") is None


@pytest.mark.parametrize(
    "points", [[(5, 0.0)], [(0, 2.0), (1, 2.0)], [(0, 1e300), (1, -1e300)], [(0, 1e-9), (9, 2e-9)]]
)
def test_curves_of_extreme_ranges_stay_on_the_sheet(points):
    svg = line_chart([Series("a", points)], "a")
    x_y = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]*)"', svg)[1].split()]
    assert all(0 <= x <= 400 and 0 <= y <= 190 for x, y in x_y)


def test_smoothing_is_a_trailing_mean():
    points = [(n, float(n)) for n in range(10)] + [(10, math.nan)]
    assert smoothed(points)[-1] == (9, 7.0)
    assert smoothed(points)[0] == (0, 0.0)


def test_ticks_are_round():
    assert ticks(0.13, 0.88) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(0, 12, 8) == [0, 2, 4, 6, 8, 10, 12]
    assert [short(v) for v in (0, 0.25, 3e-5, 1234567, 12.3456)] == ["0", "0.25", "3e-5", "1.23e6", "12.35"]


def run_of(folder, epochs, rewards=(), **more):
    """A report of a run of some epochs; `rewards` are the held-out ones of epochs 0, 10 and so on."""
    with RunFolder.open(folder, CONFIG) as run:
        log = logging(folder)
        for number, reward in enumerate(rewards):
            record = {"epoch": 10 * number, "count": 256, "weights": "ema", "reward": reward, "reward_stderr": 0.01}
            record |= {"metrics": {"strict": reward}, "health": {"clipped": 0.01}, "health_std": {"clipped": 0.05}}
            log.tell(events.Metrics(epoch=10 * number, kind="evaluation", values=record))
        for epoch in range(1, epochs + 1):
            log.tell(events.Metrics(epoch=epoch, kind="epoch", values=metrics(epoch) | more))
        run.status.update("finished", exit_code=0)
    return read(write_report(folder)).words


def test_the_first_number_is_the_held_out_gain_with_its_interval(tmp_path):
    words = run_of(tmp_path, 12, [0.852, 0.88, 0.912])
    spread = 1.96 * math.hypot(0.01, 0.01)
    assert f"+0.06, 95% interval {0.06 - spread:.3g} to {0.06 + spread:.3g}" in words
    assert "On held-out prompts the reward rose: 0.852 before training, 0.912 at epoch 20" in words
    assert words.index("Held-out reward") < words.index("Training reward")


@pytest.mark.parametrize(("after", "word"), [(0.87, "did not clearly change"), (0.80, "fell")])
def test_a_gain_within_its_interval_is_none(after, word, tmp_path):
    assert f"the reward {word}: 0.852" in run_of(tmp_path, 1, [0.852, after])


def test_one_evaluation_is_no_change(tmp_path):
    words = run_of(tmp_path, 3, [0.852])
    assert "Held-out reward" not in words
    assert "On held-out prompts" not in words


@pytest.mark.parametrize(
    ("epochs", "remark"),
    [
        (1, "one epoch"),
        (2, f"{1 / 30:+.4g} from 0.2333; first and last epoch"),
        (3, f"{2 / 30:+.4g} from 0.2333; first and last epoch"),
        (5, f"{3 / 30:+.4g} from 0.25; means of 2 epochs"),
        (12, f"{7 / 30:+.4g} from 0.3; means of 5 epochs"),
    ],
)
def test_a_short_run_is_compared_with_epochs_of_before(epochs, remark, tmp_path):
    assert remark in run_of(tmp_path, epochs)


def test_what_never_changes_is_a_line_and_no_chart(tmp_path):
    words = run_of(tmp_path, 4, lr=3e-5, skipped_steps=0)
    assert (
        "Constant: Learning rate 3e-5, Skipped optimiser steps 0, lost opinion pairs 1, identical latents pairs 0."
        in words
    )
    assert words.count("Skipped optimiser steps") == 1


def test_one_reward_is_drawn_once(tmp_path):
    with RunFolder.open(tmp_path, CONFIG):
        lines = [{k: v for k, v in metrics(n).items() if k != "reward_<b>_mean"} for n in (1, 2)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line | {"kl": None}) + "\n" for line in lines))
    page = read(write_report(tmp_path))
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels.count("strict") == 1
    assert "Reward (weighted sum)" not in labels


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.01], [3.0, 0.0, 2.0]])
def test_shares_and_counts_have_no_negative_axis(values):
    svg = line_chart([Series("clipped", list(enumerate(values)), [0.5] * 3)], "clipped")
    numbers = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert numbers
    assert not [number for number in numbers if number.startswith("-")]
    assert max(float(y) for y in re.findall(r' y2="([0-9.]+)"', svg)) <= 190
    assert ">epoch<" in svg


def test_pictures_are_told_to_those_who_do_not_see_them(run_dir):
    alts = [value for tag, name, value in read(write_report(run_dir)).attributes if (tag, name) == ("img", "alt")]
    assert "{} %s {{ 7 * 7 }}, epoch 12, strict 0.25" in alts
    assert all(len(alt) < 260 for alt in alts)


def test_a_chart_is_told_to_those_who_do_not_see_it():
    curves = [Series("<raw>", [(1, 0.5), (2, 0.75), (3, math.nan), (4, 0.25)]), Series("thin", [(1, 9.0)], faint=True)]
    svg = line_chart([*curves, Series("empty", [(1, math.nan)])], "a")
    (told,) = re.findall("<desc>(.*?)</desc>", svg)
    assert told == "&lt;raw&gt;: 0.5 at epoch 1, 0.25 at epoch 4, between 0.25 and 0.75."


def test_a_page_says_at_its_top_when_it_was_written(run_dir):
    words = read(write_report(run_dir)).words
    assert re.search(r"Written \d{4}-\d\d-\d\d \d\d:\d\d UTC", words[: words.index("tiny/shapes")])


def test_health_is_drawn_as_the_guard_counts_it(tmp_path):
    """In one chart: 0.01 to 0.06 with a spread of 0.05 is one standard deviation, which is the guard's limit."""
    with RunFolder.open(tmp_path, CONFIG):
        log = logging(tmp_path)
        for epoch, mean in ((0, 0.01), (10, 0.06)):
            values = {"epoch": epoch, "weights": "ema", "metrics": {"strict": 0.5}}
            values |= {"health": {"clipped": mean, "sharpness": 0.2}, "health_std": {"clipped": 0.05, "sharpness": 0.1}}
            log.tell(events.Metrics(epoch=epoch, kind="evaluation", values=values))
    page = read(write_report(tmp_path))
    assert "clipped, epoch 10: 1" in page.text
    assert "sharpness, epoch 10: 0" in page.text
    assert "±1, where the guard would speak" in page.words
