"""Images of fixed prompts and seeds after each round: the person sees the model move."""

from __future__ import annotations

import json
import logging
from typing import Any

from fdfo_engine.label.link import EngineLink
from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.json_text import json_object

STRIP_NAME = "label_strip.json"
_GENERATION_WAIT_S = 620.0


class Strip:
    """The images by epoch; their ids are kept in the run folder, since old checkpoints are not."""

    def __init__(self, link: EngineLink, count: int) -> None:
        self._link, self._count = link, count
        self._path = link.folder / STRIP_NAME
        self.epochs: dict[int, list[dict[str, str]]] = {}
        if self._path.is_file():
            try:
                kept = json_object(self._path.read_bytes())
                self.epochs = {int(epoch): _images(images) for epoch, images in kept.items()}
            except ValueError as error:
                logging.getLogger(__name__).warning("%s: %s; the images of earlier rounds are lost", self._path, error)

    def lacks(self, epoch: int) -> bool:
        """Whether nothing was drawn at `epoch`."""
        return self._count > 0 and epoch not in self.epochs

    async def draw(self, epoch: int, prompts: list[str]) -> None:
        """Draws the images of the weights after `epoch`, the first of `prompts` each; a second time changes nothing.

        Raises:
            Problem: the engine is away or refuses.
        """
        model = "base" if epoch == 0 else f"run@epoch_{epoch:06d}"
        images = []
        for number, prompt in enumerate(prompts[: self._count]):
            body = {"prompt": prompt, "model": model, "seed": number, "response_format": "url"}
            answer = await self._link.post(
                "/v1/images/generations", body, f"label-strip-{epoch}-{number}", _GENERATION_WAIT_S
            )
            images.append({"image": _id_of(answer), "prompt": prompt})
        self.epochs[epoch] = images
        replace_file(self._path, json.dumps(self.epochs).encode())

    def view(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return [{"epoch": epoch, "images": images} for epoch, images in sorted(self.epochs.items())]


def _images(value: Any) -> list[dict[str, str]]:
    try:
        return [{"image": str(item["image"]), "prompt": str(item["prompt"])} for item in value]
    except (TypeError, KeyError) as error:
        raise ValueError(f"holds no list of images: {error!r}") from error


def _id_of(answer: dict[str, Any]) -> str:
    return str(answer["data"][0]["url"]).split("/")[-2]
