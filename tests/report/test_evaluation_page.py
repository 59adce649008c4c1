"""The page of an evaluation: opens offline, shows every prompt as text, and picks winners by the first metric."""

import re

import pytest
import torch
from report.test_report_page import NASTY, assert_opens_offline, read

from fdfo_engine.config import GuardConfig
from fdfo_engine.evaluation.compare import Measured, Request, summarize
from fdfo_engine.metrics import HEALTH
from fdfo_engine.report.curves import short, trade_off_chart
from fdfo_engine.report.evaluation_files import write_evaluation
from fdfo_engine.report.evaluation_page import _rows, evaluation_table, extremes, shown_prompts, write_evaluation_page
from fdfo_engine.runtime.errors import UsageError

PROMPTS = [*NASTY, *(f"prompt {i}" for i in range(20))]
KINDS = {"strict": "reward", "<b>odd</b>": "reward", "pixel_diversity": "diversity", "saturation": "health"}


def measured(name, epoch, shift, saturation=0.3):
    noise = torch.rand(len(PROMPTS), 2, generator=torch.Generator().manual_seed(epoch))
    scores = {
        "strict": noise + shift, "<b>odd</b>": noise * torch.nan, "pixel_diversity": noise[:, :1] - shift,
        "saturation": 0.02 * noise + saturation,
    }  # fmt: skip
    return Measured(name, epoch, "raw", scores, torch.randint(0, 256, (len(PROMPTS), 3, 16, 24), dtype=torch.uint8))


def summary(*sets):
    result = summarize(sets, KINDS, Request(PROMPTS, 3, 2), GuardConfig(), resamples=200)
    larger = {"width": 96, "height": 96, "note": "a multiple of 8 up to 64"}
    return result | {"title": "a & b", "model": "tiny", "height": 16, "width": 24, "larger": larger}


@pytest.fixture
def sets():
    return [measured("base", 0, 0.0), measured("epoch_000005", 5, 0.5), measured("epoch_000010", 10, 1.0, 0.8)]


def test_the_page_holds_everything_and_opens_offline(sets, tmp_path):
    result = summary(*sets)
    page = write_evaluation(tmp_path / "out", result, {s.name: s.previews for s in sets}, 4)
    assert page == tmp_path / "out/report.html"
    found = read(page)
    assert_opens_offline(found)
    words = re.sub(r"\s+", " ", found.words)
    for text in (
        "a & b: base against epoch_000010", "Image health left its band", "epoch_000010: saturation went from",
        "Winners by strict", "Reward against diversity", "Over the checkpoints", "95% intervals",
        "<b>odd</b>", "Not measured: a multiple of 8 up to 64", "<script>alert('x')</script>",
    ):  # fmt: skip
        assert text in words, text
    shown = shown_prompts(result, 4)
    winners, losers = extremes(result)
    assert found.tags.count("img") == 3 * (4 + len(winners) + len(losers))
    assert len(list((tmp_path / "out/pictures/base").iterdir())) == len(shown)
    assert "no picture" not in words


def test_what_left_its_band_is_marked_in_its_row(sets):
    result = summary(*sets)
    for name, trend in (("epoch_000005", ""), ("epoch_000010", "bad")):
        rows = {row["name"]: row["trend"] for row in _rows(result, name)}
        assert rows == {"strict": "good", "<b>odd</b>": "", "pixel_diversity": "bad", "saturation": trend}


def test_a_quiet_page_says_how_far_it_was_from_a_finding(sets, tmp_path):
    """Against the base's own mean and standard deviation over its images, by hand."""
    sets[2] = measured("epoch_000010", 10, 1.0, 0.32)
    assert not any(summary(*sets)["health_findings"].values())
    base, now = (s.scores["saturation"].double().flatten() for s in (sets[0], sets[2]))
    expected = (now.mean() - base.mean()) / max(base.std(), HEALTH["saturation"].least_spread)
    assert summary(*sets)["health_drift"]["epoch_000010"]["saturation"] == pytest.approx(expected.item())
    page = read(write_evaluation(tmp_path, summary(*sets), {}, 0))
    assert f"Farthest: saturation at epoch_000010, {expected:+.2f} standard deviations" in page.words


def test_winners_and_losers_are_ordered_and_unknown_scores_are_neither(sets):
    changes = sets[-1].by_prompt("strict") - sets[0].by_prompt("strict")
    winners, losers = extremes(summary(*sets))
    assert winners == changes.argsort(descending=True)[:6].tolist()
    assert losers == [i for i in changes.argsort().tolist() if changes[i] < 0][:6]
    sets[-1].scores["strict"][winners[0]] = torch.nan
    assert all(winners[0] not in prompts for prompts in extremes(summary(*sets)))
    assert extremes(summary(sets[0])) == ([], [])


def test_the_table_says_what_left_its_band_and_has_no_control_characters(sets):
    lines = evaluation_table(summary(*sets))
    assert lines[0].split() == ["metric", "base", "epoch_000005", "difference", "bootstrap", "rose", "/", "fell"]
    assert any(line.startswith("image health, epoch_000010: saturation went") for line in lines)
    assert any("96 x 96 was not measured" in line for line in lines)
    odd = next(line for line in lines if line.startswith("<b>odd</b>"))
    assert odd.split()[1:] == ["none"] * 4
    assert all(line.isprintable() for line in lines)


def test_the_first_sentence_says_what_became_of_reward_and_diversity(sets, tmp_path):
    """The noise of both sets is drawn apart, shifted by 1: each prompt's mean rises, and pixel diversity falls."""
    words = read(write_evaluation(tmp_path, summary(*sets), {}, 0)).words
    first, last = (s.by_prompt("strict") for s in (sets[0], sets[2]))
    verdict = words[words.index("strict rose: ") :]
    assert verdict.startswith(f"strict rose: {(last - first).mean().item():+.4g} [")
    assert "better on 100% of the prompts, worse on 0%. pixel_diversity fell: -" in verdict
    assert words.index("strict rose: ") < words.index("Image health left its band")
    sets[2].scores["strict"] = sets[0].scores["strict"].clone()
    assert "strict did not clearly change: +0" in read(write_evaluation(tmp_path, summary(*sets), {}, 0)).words


def test_under_a_picture_stand_its_own_scores_and_the_mean(sets, tmp_path):
    """The picture is the first of a prompt's two images; winners are chosen by the mean of both."""
    result = summary(*sets)
    page = read(write_evaluation(tmp_path, result, {s.name: s.previews for s in sets}, 1))
    own, other = sets[2].scores["strict"][0].tolist()
    assert own != pytest.approx(other, rel=0.01)
    assert f"strict {short(own)} (mean of 2: {short((own + other) / 2)})" in page.text
    assert "<b>odd</b> none (mean of 2: none)" in page.text


def test_with_one_image_a_prompt_there_is_no_mean(sets, tmp_path):
    for one in sets:
        one.scores["strict"] = one.scores["strict"][:, :1]
    result = summarize(sets, {"strict": "reward"}, Request(PROMPTS, 3, 1), GuardConfig(), resamples=200)
    result |= {"title": "a", "model": "tiny", "height": 16, "width": 24, "larger": None}
    page = read(write_evaluation(tmp_path, result, {s.name: s.previews for s in sets}, 1))
    assert f"strict {short(float(sets[0].scores['strict'][0, 0]))}" in page.text
    assert "(mean of" not in page.words


def test_one_set_alone(sets, tmp_path):
    page = read(write_evaluation(tmp_path, summary(sets[0]), {"base": sets[0].previews}, 0))
    assert_opens_offline(page)
    assert "band" not in page.words.split("Metrics")[0]
    assert "img" not in page.tags


def test_a_folder_without_an_evaluation(tmp_path):
    with pytest.raises(UsageError, match=r"no evaluation\.json"):
        write_evaluation_page(tmp_path)


def test_trade_off_chart_names_its_points():
    svg = trade_off_chart([("a<b", 0.0, 1.0), ("c", 1.0, 0.5), ("lost", float("nan"), 1.0)], "x")
    assert svg.count("<circle") == 2
    assert "a&lt;b: 0, 1" in svg
    assert trade_off_chart([("lost", float("nan"), 1.0)], "x") is None


def test_names_of_points_that_lie_close_do_not_overlap():
    svg = trade_off_chart([("base", 0.0, 1.0), ("epoch_000040", 0.98, 0.02), ("epoch_000045", 1.0, 0.0)], "a")
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="end">epoch', svg)
    (_, one), (_, other) = [(float(x), float(y)) for x, y in places]
    assert abs(one - other) >= 10
