"""Pictures of a run, as files: grids of pairs, and the images of evaluations."""

from __future__ import annotations

import json
from pathlib import Path

from fdfo_engine.runtime import events
from fdfo_engine.runtime.durable import plain_json, replace_file
from fdfo_engine.runtime.picture import draw_grid, save_png, to_picture

IMAGES_NAME = "images"
MAX_EVALUATION_IMAGES = 24


def grid(name: str, epoch: int, pixels: events.Pixels, captions: list[str], columns: int = 2) -> events.Images:
    """The event of images `[N, 3, H, W]` in 0..1 that go to one file; 2 columns put a pair side by side."""
    file = f"{IMAGES_NAME}/{name}.png"
    return events.Images(
        epoch=epoch, name=name, files=(file,), captions=tuple(captions), columns=columns, pixels=pixels
    )  # fmt: skip


def evaluation_images(
    epoch: int, prompts: list[str], pixels: events.Pixels, scores: dict[str, list[float]]
) -> events.Images:
    """The event of the first 24 images of an evaluation, a file each, with prompts and scores by metric."""
    name, count = f"evaluation_epoch_{epoch:06d}", min(len(prompts), MAX_EVALUATION_IMAGES)
    files = tuple(f"{IMAGES_NAME}/{name}/{n:03d}.png" for n in range(count))
    kept: dict[str, tuple[float | None, ...]] = {metric: tuple(values[:count]) for metric, values in scores.items()}
    return events.Images(
        epoch=epoch, name=name, files=files, captions=tuple(prompts[:count]), scores=kept, pixels=pixels[:count]
    )


class RunPictures:
    """Writes the pictures that an event brings along; a listener that comes before the event's line is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, event: events.Event) -> None:
        """Writes the files of an `Images` event.

        Raises:
            OSError, CheckpointError: the storage refuses.
        """
        data = event.data
        if not isinstance(data, events.Images) or data.pixels is None:
            return
        if data.columns is not None:
            save_png(draw_grid(data.pixels, data.captions, data.columns), self._folder / data.files[0])
            return
        for file, image in zip(data.files, data.pixels, strict=True):
            save_png(to_picture(image), self._folder / file)
        items = [
            {"file": file.removeprefix(f"{IMAGES_NAME}/"), "prompt": data.captions[n], "scores": _scores(data, n)}
            for n, file in enumerate(data.files)
        ]
        text = json.dumps(plain_json({"epoch": data.epoch, "items": items}), indent=1)
        replace_file(self._folder / IMAGES_NAME / f"{data.name}.json", text.encode())


def _scores(data: events.Images, number: int) -> dict[str, float | None]:
    return {metric: values[number] for metric, values in data.scores.items()}
