"""`fdfo rewards`: what is listed, shown, verified and tried, and what is said where something is missing."""

import inspect
import math

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image

from fdfo_engine.cli.main import main
from fdfo_engine.rewards import Reward, drawings, names, registry, verification
from fdfo_engine.runtime.errors import EnvironmentProblem

HUB = ("clip", "pickscore", "hpsv2", "aesthetic", "geneval", "vlm", "vlm_alignment", "vlm_quality", "vlm_photorealism")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache; whoever asks the hub fails."""

    def refuse(*arguments, **more):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", refuse)
    monkeypatch.setattr("httpx2.Client.send", refuse)


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png", pixels


def fdfo(capsys, *words):
    """Exit status, what was printed, what was complained of."""
    code = main(["rewards", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("words", [(), ("list",)])
def test_every_reward_has_a_line(capsys, words):
    code, out, _ = fdfo(capsys, *words)
    assert code == 0
    for name in names():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert inspect.getdoc(registry.find(name, "x")).startswith(line.removeprefix(name).strip())
        assert len(line) <= 140


@pytest.mark.parametrize("words", [("hpsv2",), ("show", "hpsv2")])
def test_one_is_shown_with_options_licence_and_weights(capsys, hub, words):
    code, out, _ = fdfo(capsys, *words)
    assert code == 0
    assert 'model (text; default "adams-story/HPSv2-hf")' in out
    assert "Apache-2.0" in out
    assert "batch_size (a whole number >= 1; default 16)" in out
    assert "adams-story/HPSv2-hf: 986 M parameters, 3.9 GB in float32; not on this machine" in out
    assert "kill_after_s" in out


@pytest.mark.parametrize("name", names())
def test_any_can_be_shown(capsys, hub, name):
    code, out, _ = fdfo(capsys, name)
    assert code == 0
    assert out.startswith(f"{name}\n\n{inspect.getdoc(registry.find(name, 'x')).splitlines()[0]}")


def test_ones_own_is_shown_with_its_keywords(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine_to_show.py").write_text('def f(prompts, images, gamma, factor=2.0):\n    """What it says."""\n')
    monkeypatch.chdir(tmp_path)
    code, out, _ = fdfo(capsys, "./mine_to_show.py:f")
    assert code == 0
    for part in ("What it says.", "gamma (required)", "factor (default 2.0)"):
        assert part in out


def test_the_drawn_pictures_are_small_whole_and_of_several_shapes():
    drawn = drawings.pictures()
    assert all(picture.image.min() >= 0 and picture.image.max() <= 1 for picture in drawn)
    shapes = [tuple(picture.image.shape) for picture in drawn]
    assert {height < width for _, height, width in shapes} == {True, False}
    assert any(height % 2 and width % 2 for _, height, width in shapes)
    again = drawings.pictures()
    assert all(torch.equal(one.image, other.image) for one, other in zip(drawn, again, strict=True))


@pytest.mark.parametrize("name", ["brightness", "shapes", "shapes_strict"])
def test_what_needs_no_weights_is_as_recorded(capsys, name):
    code, out, _ = fdfo(capsys, "verify", name)
    assert code == 0
    assert f"ok      {name}" in out
    assert "scores are as recorded" in out


def test_the_reader_is_as_recorded(capsys):
    pytest.importorskip("rapidocr_onnxruntime")
    code, out, _ = fdfo(capsys, "verify", "ocr")
    assert code == 0
    assert "0.75" in out
    assert "scores are as recorded" in out


def test_recorded_brightness_is_the_mean_of_the_pictures():
    means = [float(picture.image.double().mean()) for picture in drawings.pictures()]
    assert np.allclose(means, verification.RECORDED["brightness"], atol=1e-5)


def test_other_scores_than_recorded_are_told(capsys, monkeypatch):
    monkeypatch.setitem(verification.RECORDED, "brightness", (0.5,) * len(drawings.pictures()))
    code, out, err = fdfo(capsys, "verify", "brightness", "shapes")
    assert code == 5
    assert "WRONG   brightness" in out
    assert "recorded are     0.5" in out
    assert "ok      shapes" in out, "the others are verified all the same"
    assert "brightness: see above" in err


@pytest.mark.parametrize(
    ("scorer", "code", "message"),
    [
        (lambda p, x: x.flatten(1).mean(1), 0, "passes its self-test; no scores are recorded"),
        (lambda p, x: -x.flatten(1).mean(1), 5, "self-test: a red circle scores"),
        (lambda p, x: [][0], 5, "scores nothing; no opinion on 6 of 6 pictures: IndexError"),
        (
            lambda p, x: {}[0] if x.shape[-1] == 133 else x.flatten(1).mean(1),
            0,
            "no opinion on 1 of 6 pictures: KeyError: 0",
        ),
    ],
)
def test_a_reward_that_does_not_see_is_found_out(capsys, monkeypatch, scorer, code, message):
    monkeypatch.setitem(registry._registered, "test_scorer", scorer)
    found, out, _ = fdfo(capsys, "verify", "test_scorer")
    assert found == code
    assert message in out


@pytest.mark.parametrize("name", HUB)
def test_absent_weights_are_named_with_their_size_and_never_fetched(capsys, hub, name):
    code, out, err = fdfo(capsys, "verify", name)
    assert code == EnvironmentProblem.exit_code
    assert f"absent  {name}" in out
    assert "M parameters" in out
    assert f"fetch it: fdfo rewards verify {name} --allow-download" in out
    assert f"{name}: not here" in err


def test_all_are_verified_where_none_is_named(capsys, hub, monkeypatch):
    class NeedsAKey(Reward):
        def require_ready(self):
            raise EnvironmentProblem("set the key")

    monkeypatch.setitem(registry._registered, "needs_a_key", NeedsAKey)
    code, out, _ = fdfo(capsys, "verify")
    assert code == 0, "absent is no failure where nobody asked for it"
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    states = {line[1]: line[0] for line in lines if line[0] in ("ok", "absent", "skipped")}
    assert states.keys() == set(names())
    assert states["http"] == "skipped"
    assert states["needs_a_key"] == states["vlm_server"] == "absent"
    assert "set the key" in out


def test_a_picture_is_scored_by_one_reward(capsys, picture):
    file, pixels = picture
    code, out, _ = fdfo(capsys, "try", "brightness", "--image", file, "--prompt", "anything")
    assert code == 0
    score, name = out.split()
    assert float(score) == pytest.approx(pixels.mean() / 255, rel=1e-5)
    assert name == str(file)


def test_ones_own_is_tried_with_options_on_several_pictures(capsys, picture, tmp_path, monkeypatch):
    file, pixels = picture
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_to_try.py").write_text(
        "def f(prompts, images, factor=1.0):\n    return factor * images.mean((1, 2, 3)) + len(prompts[0])\n"
    )
    words = ("try", "./mine_to_try.py:f", "factor=-2.5", "--image", file, "--image", file, "--prompt", "four")
    code, out, _ = fdfo(capsys, *words)
    assert code == 0
    assert "will import mine_to_try" in out
    scores = [float(line.split()[0]) for line in out.splitlines()[1:]]
    assert scores == pytest.approx([4 - 2.5 * pixels.mean() / 255] * 2, rel=1e-4)


def test_no_opinion_is_an_error_with_its_cause(capsys, picture, monkeypatch):
    def crashes(prompts, images):
        raise ValueError("oh no")

    monkeypatch.setitem(registry._registered, "test_scorer", crashes)
    code, out, err = fdfo(capsys, "try", "test_scorer", "--image", picture[0])
    assert code == 5
    assert math.isnan(float(out.split()[0]))
    assert "ValueError: oh no" in err
    assert "test_scorer: no opinion on" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nonesuch",), 2, "no such reward"),
        (("verify", "brightnes"), 2, "did you mean 'brightness'"),
        (("show",), 2, "takes list, show NAME, verify"),
        (("clip", "hpsv2"), 2, "takes list, show NAME, verify"),
        (("clip", "--image", "PICTURE"), 2, "belong to `fdfo rewards try NAME`"),
        (("verify", "--prompt", "x"), 2, "belong to `fdfo rewards try NAME`"),
        (("try", "clip"), 2, "try NAME --image FILE"),
        (("try", "--image", "PICTURE"), 2, "try NAME --image FILE"),
        (("try", "factor=2", "--image", "PICTURE"), 2, "try NAME --image FILE"),
        (("try", "brightness", "--image", "nowhere.png"), 2, "nowhere.png: No such file"),
        (("try", "brightness", "--image", __file__), 2, "no picture that Pillow can read"),
        (("try", "brightness", "gamma=2", "--image", "PICTURE"), 2, "gamma"),
        (("try", "ocr", "threads=none", "--image", "PICTURE"), 2, "reward.threads: input should be a valid integer"),
        (("try", "ocr", "threads", "--image", "PICTURE"), 2, "threads: takes section.key=value"),
        (("try", "brightness", "weight=0", "--image", "PICTURE"), 2, "weight: is 0"),
        (("try", "clip", "--image", "PICTURE"), 3, "allow it with --allow-download"),
        (("try", "geneval", "--image", "PICTURE"), 2, "reward.metadata: field required"),
    ],
)
def test_a_mistake_is_one_readable_line(capsys, hub, picture, words, code, message):
    given = [picture[0] if word == "PICTURE" else word for word in words]
    found, _, err = fdfo(capsys, *given)
    assert found == code, err
    assert message in err
    assert "Traceback" not in err
