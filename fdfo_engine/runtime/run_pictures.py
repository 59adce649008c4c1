"""Pictures of a run, as files: grids of pairs, and the images of evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from fdfo_engine.runtime import events
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.durable import plain_json, replace_file
from fdfo_engine.runtime.picture import draw_grid, save_png, to_picture

IMAGES_NAME = "images"
MAX_EVALUATION_IMAGES = 24
_PAIRS_A_ROW = 2


def pairs_grid(
    name: str, epoch: int, images_PK: events.Pixels, prompts: Sequence[str], rewards_PK: Sequence[Sequence[float]]
) -> events.Images:
    """The event of the pairs `[P, 2, 3, H, W]` in 0..1 that go to one file, two of them a row.

    The prompt stands under the first picture of a pair, and its reward under each; NaN is a picture without one.
    """
    captions = []
    for prompt, rewards in zip(prompts, rewards_PK, strict=True):
        first, second = (f"{reward:.3g}" if math.isfinite(reward) else "no reward" for reward in rewards)
        captions += [f"{first}: {prompt}", second]
    return events.Images(
        epoch=epoch, name=name, files=(f"{IMAGES_NAME}/{name}.png",), captions=tuple(captions),
        columns=2 * min(_PAIRS_A_ROW, len(prompts)), pixels=images_PK.flatten(0, 1),
        scores={"reward": tuple(_finite(reward) for rewards in rewards_PK for reward in rewards)},
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
            CheckpointError: the storage refuses the list of an evaluation's pictures.
        """
        data = event.data
        if not isinstance(data, events.Images) or data.pixels is None:
            return
        if data.columns is not None:
            self._save(draw_grid(data.pixels, data.captions, data.columns, framed=_better(data)), data.files[0])
            return
        for file, image in zip(data.files, data.pixels, strict=True):
            self._save(to_picture(image), file)
        items = [
            {"file": file.removeprefix(f"{IMAGES_NAME}/"), "prompt": data.captions[n], "scores": _scores(data, n)}
            for n, file in enumerate(data.files)
        ]
        text = json.dumps(plain_json({"epoch": data.epoch, "items": items}), indent=1)
        replace_file(self._folder / IMAGES_NAME / f"{data.name}.json", text.encode())

    def _save(self, picture: Image, file: str) -> None:
        """A picture may be missing: a storage that refuses it costs a warning. What the run needs fails by itself."""
        try:
            save_png(picture, self._folder / file)
        except OSError as error:
            warn(f"{self._folder / file}: no picture: {error.strerror or error}", like="a picture of the run")


def _better(data: events.Images) -> set[int]:
    """Of a grid of pairs the picture of each that has the higher reward, where both have one and they differ."""
    rewards, found = data.scores.get("reward", ()), set()
    for first in range(0, len(rewards) - 1, 2):
        a, b = rewards[first : first + 2]
        if a is not None and b is not None and a != b:
            found.add(first if a > b else first + 1)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _scores(data: events.Images, number: int) -> dict[str, float | None]:
    return {metric: values[number] for metric, values in data.scores.items()}
