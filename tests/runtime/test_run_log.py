import json
import sys

import pytest
import torch
from PIL import Image

from fdfo_engine.runtime import events
from fdfo_engine.runtime.durable import append_line
from fdfo_engine.runtime.errors import CheckpointError, EnvironmentProblem
from fdfo_engine.runtime.events import EventStream
from fdfo_engine.runtime.picture import draw_grid, to_picture
from fdfo_engine.runtime.run_log import RunLog
from fdfo_engine.runtime.run_pictures import RunPictures, _better, evaluation_images, pairs_grid
from fdfo_engine.runtime.terminal import Terminal, duration

NASTY = ["<script>alert(1)</script>", "\x1b[31mred", "{} %s {0}", "../../etc", "😀" * 5000, "line\nbreak", ""]


def record(epoch, **changes):
    values = {
        "epoch": epoch, "reward_mean": 2.0 + epoch / 10, "reward_std": 0.25, "images_per_second": 5.2,
        "seconds_rollout": 33.1, "seconds_reward": 4.0, "seconds_update": 60.2, "seconds_total": 100.0,
        "skipped_steps": 0, "tied_pairs": 3,
    }  # fmt: skip
    return values | changes


def plain_log(folder, **options):
    return RunLog(folder, **{"tensorboard": False} | options)


def tell(record, *listeners, kind="epoch"):
    EventStream(listeners).tell(events.Metrics(epoch=record["epoch"], kind=kind, values=record))


def test_epoch_writes_one_whole_line_and_prints_one(tmp_path, capsys):
    log, terminal = plain_log(tmp_path), Terminal(epochs=10)
    tell(record(1, kl=float("nan")), log, terminal)
    tell(record(2), log, terminal)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["kl"] is None
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == (
        "epoch  2/10  reward   2.2000 ±0.2500 (+0.1000)     5.20 img/s  rollout 33.1s reward 4.0s update 60.2s  "
        "skipped 0 tied 3  left 13m 20s"
    )


def test_epoch_without_optional_numbers_still_prints(tmp_path, capsys):
    tell({"epoch": 1, "reward_mean": None}, plain_log(tmp_path), Terminal(epochs=10))
    assert "reward      nan" in capsys.readouterr().out


def test_append_after_a_failure_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    append_line(path, {"epoch": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match="no space left on"):
            append_line(path, {"epoch": 2})
    append_line(path, {"epoch": 3})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 3}\n'


def test_evaluation(tmp_path, capsys):
    log = plain_log(tmp_path)
    metrics = {"epoch": 10, "count": 64, "seed": 0, "weights": "ema", "metrics": {"strict": 0.5}}
    tell(metrics | {"metrics_stderr": {"strict": 0.06}}, log, Terminal(), kind="evaluation")
    assert json.loads((tmp_path / "evaluations.jsonl").read_text())["metrics"] == {"strict": 0.5}
    assert capsys.readouterr().out == "evaluation after epoch 10 (64 images, ema): strict 0.5000 ±0.0600\n"


def test_grid_takes_any_caption(tmp_path):
    EventStream([RunPictures(tmp_path)]).tell(
        pairs_grid("rollout_000001", 1, torch.rand(7, 2, 3, 12, 16), NASTY, [[0.0, float("nan")]] * 7)
    )
    with Image.open(tmp_path / "images" / "rollout_000001.png") as sheet:
        assert sheet.width > 2 * 64
        assert sheet.height > 4 * 48


def test_grid_puts_pairs_side_by_side():
    images = torch.zeros(4, 3, 64, 64)
    images[1] = 1.0
    sheet = draw_grid(images, ["0.1", "0.9", "0.2", "0.3"], columns=2)
    assert sheet.getpixel((4 + 32, 4 + 32)) == (0, 0, 0)
    assert sheet.getpixel((4 + 192 + 4 + 32, 4 + 32)) == (255, 255, 255)
    assert sheet.getpixel((4 + 192 + 4 + 32, 4 + 228 + 32)) == (0, 0, 0)


def test_a_grid_of_pairs_frames_the_better_picture_and_says_a_prompt_once():
    rewards = [[0.25, 0.5], [0.5, 0.25], [0.5, 0.5], [0.5, float("nan")]]
    event = pairs_grid("pairs", 1, torch.zeros(4, 2, 3, 192, 192), ["a", "b", "c", "d"], rewards)
    assert event.captions == ("0.25: a", "0.5", "0.5: b", "0.25", "0.5: c", "0.5", "0.5: d", "no reward")
    assert event.columns == 4
    framed = _better(event)
    assert framed == {1, 2}
    sheet = draw_grid(event.pixels, event.captions, event.columns, framed)
    edges = [sheet.getpixel((4 + n * 196 - 1, 100)) for n in range(4)]  # left of each picture of the first row
    assert [edge == edges[1] for edge in edges] == [False, True, True, False]


def test_large_images_are_scaled_down():
    assert max(draw_grid(torch.zeros(1, 3, 1024, 512), ["x"], columns=1).size) < 400


def test_picture_of_impossible_values():
    image = torch.tensor([float("nan"), -1.0, 2.0]).reshape(3, 1, 1)
    assert to_picture(image).getpixel((0, 0)) == (0, 0, 255)


def test_evaluation_images_layout(tmp_path):
    count = 30
    images = torch.linspace(0, 1, count).reshape(-1, 1, 1, 1).expand(count, 3, 8, 8)
    prompts = (NASTY * 5)[:count]
    told = evaluation_images(7, prompts, images, {"strict": [n / 10 for n in range(count)]})
    EventStream([RunPictures(tmp_path)]).tell(told)
    listing = json.loads((tmp_path / "images" / "evaluation_epoch_000007.json").read_text())
    assert listing["epoch"] == 7
    assert [item["prompt"] for item in listing["items"]] == prompts[:24]
    assert listing["items"][3]["scores"] == {"strict": 0.3}
    files = sorted((tmp_path / "images" / "evaluation_epoch_000007").iterdir())
    assert [f"{f.parent.name}/{f.name}" for f in files] == [item["file"] for item in listing["items"]]
    with Image.open(files[0]) as picture:
        assert picture.size == (8, 8)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = plain_log(tmp_path, tensorboard=True)
    tell(record(1), log)
    tell(record(2), log)
    log.close()
    log = plain_log(tmp_path, tensorboard=True, first_epoch=1)
    tell(record(2, reward_mean=9.0), log)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, round(e.value, 3)) for e in board.Scalars("train/reward_mean")] == [(1, 2.1), (2, 9.0)]


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_absent_tracker_says_what_to_install(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentProblem, match=f"log.{name}: .*pip install"):
        plain_log(tmp_path, **{name: True})


def test_wandb_gets_the_numbers_and_one_identity(tmp_path, monkeypatch):
    class Wandb:
        calls, logged = [], []

        @classmethod
        def init(cls, **options):
            cls.calls.append(options)
            return cls

        @classmethod
        def log(cls, values):
            cls.logged.append(values)

        finish = staticmethod(lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for epoch in (1, 2):
        log = plain_log(tmp_path, wandb=True, settings={"run": {"seed": 0}})
        tell(record(epoch), log)
        log.close()
    assert Wandb.calls[0] == Wandb.calls[1]
    assert Wandb.calls[0]["config"] == {"run": {"seed": 0}}
    assert Wandb.logged[1]["train/reward_mean"] == pytest.approx(2.2)


def test_other_ranks_keep_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    terminal = Terminal(epochs=3)
    tell(record(1), terminal)
    EventStream([terminal]).tell(events.Phase(epoch=1, name="rollout", done=0, total=4))
    terminal.tick()
    terminal.close()
    assert capsys.readouterr() == ("", "")


def test_parts_of_a_reward_are_on_the_line(capsys):
    parts = {"reward_clip_mean": 0.25, "reward_a_b_mean": -3.0}
    tell(record(1, **parts), Terminal(epochs=1))
    assert "(+0.0000) [clip 0.25, a_b -3]" in capsys.readouterr().out
    tell(record(1, reward_clip_mean=0.25), Terminal(epochs=1))
    assert "clip" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m 00s"), (725, "12m 05s"), (12_000, "3h 20m"), (187_300, "2d 4h"), (float("nan"), "?")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
