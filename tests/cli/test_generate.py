"""Grids and films over checkpoints, on a tiny pipeline."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.cli.main import main
from fdfo_engine.config import dump_config
from fdfo_engine.runtime.picture import draw_grid, to_picture


@pytest.fixture(scope="module")
def run_dir(tiny_sd3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(tiny_sd3, folder, optimizer={"lr": 0.05})
    engine = Engine(config)
    for _ in range(3):
        rollout = engine.rollout(PROMPTS)
        engine.update(rollout, 10 * rollout.images.flatten(2).mean(2))
        engine.save()
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def generate(run_dir, out, *words):
    assert main(["generate", str(run_dir), "--prompt", "a cat", "--prompt", "a dog", "--out", str(out), *words]) == 0
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def test_a_grid_has_a_row_for_each_prompt_and_a_column_for_each_checkpoint(run_dir, tmp_path):
    records = generate(run_dir, tmp_path / "out", "--checkpoint", "all", "--compare", "--seed", "3")
    kept = ["untrained", "epoch 2", "epoch 3"]
    assert [r["weights"] for r in records] == [name for name in kept for _ in range(2)]
    assert len({r["file"] for r in records}) == len(records)
    engine = Engine.resume(run_dir, "epoch_000002")
    images = engine.generate(["a cat", "a dog"], seed=3)
    for record, image in zip(records[2:4], images, strict=True):
        assert np.array_equal(pixels(tmp_path / "out" / record["file"]), to_picture(image))
        with Image.open(tmp_path / "out" / record["file"]) as picture:
            assert json.loads(picture.text["fdfo_engine"]) == record
    assert pixels(tmp_path / "out/grid.png").shape[:2] == draw_grid(images[[0, 0, 0, 1, 1, 1]], [""] * 6, 3).size[::-1]


@pytest.mark.parametrize(("kind", "file"), [("gif", "film.gif"), ("apng", "film.png")])
def test_a_film_begins_untrained_and_has_a_frame_for_each_checkpoint(run_dir, tmp_path, kind, file):
    generate(run_dir, tmp_path / "out", "--checkpoint", "all", "--film", kind, "--frame-ms", "300")
    with Image.open(tmp_path / "out" / file) as film:
        assert film.n_frames == 3
        frames, durations = [], []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(np.asarray(film.convert("RGB")).astype(int))
            durations.append(film.info["duration"])
    assert durations == [300, 300, 600]
    for name, frame in zip(("untrained", "epoch_2", "epoch_3"), frames, strict=True):
        suffix = "" if name == "epoch_3" else f"_{name}"
        picture = pixels(tmp_path / f"out/0000_a_cat{suffix}.png")
        shown = frame[4 : 4 + 192, 4 : 4 + 192][::12, ::12]
        assert np.abs(shown - picture).mean() < (0.5 if kind == "apng" else 12), name


def test_a_picture_says_how_it_is_made_again(run_dir, tmp_path, capsys):
    *_, record = generate(run_dir, tmp_path / "out", "--seed", "3", "--steps", "2", "--guidance-scale", "1.5")
    assert capsys.readouterr().out.startswith("2 prompts, epoch 3: ")
    engine = Engine.resume(run_dir)
    assert (record["model"], record["height"], record["width"]) == (engine.config.model.id, 16, 16)
    words = {key: record[key] for key in ("seed", "steps", "guidance_scale")}
    image = engine.generate([record["prompt"]], first=record["index"], **words)[0]
    assert np.array_equal(pixels(tmp_path / "out" / record["file"]), to_picture(image))


def test_a_film_says_what_it_cannot_show(run_dir, tmp_path, capsys):
    generate(run_dir, tmp_path / "out", "--checkpoint", "all", "--film", "gif", "--steps", "1")
    assert "the run keeps its newest 2 checkpoints" in capsys.readouterr().err


def test_prompts_of_a_table_and_a_wrong_checkpoint(run_dir, tmp_path, capsys):
    (tmp_path / "p.csv").write_text('Prompts,Category\n"a, b",x\n,x\nc,y\n')
    words = ["generate", str(run_dir), "--prompts", str(tmp_path / "p.csv"), "--column", "Prompts", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert "2 prompts (left out: 1 blank)\n" in capsys.readouterr().out
    lines = (tmp_path / "a/images.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a, b", "c"]
    assert main([*words, "--out", str(tmp_path / "b"), "--checkpoint", "epoch_000009"]) == 7
    assert "epoch_000009" in capsys.readouterr().err
