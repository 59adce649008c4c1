"""Images of fixed prompts and seeds after each round: the person sees the model move."""

from __future__ import annotations

import json
import logging
from typing import Any

from fdfo_engine.label.link import EngineLink
from fdfo_engine.runtime.durable import replace_file

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
                kept = json.loads(self._path.read_text())
                self.epochs = {int(epoch): images for epoch, images in kept.items()}
            except (ValueError, AttributeError):
                logging.getLogger(__name__).warning("%s: is no JSON; the images of earlier rounds are lost", self._path)

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


def _id_of(answer: dict[str, Any]) -> str:
    return str(answer["data"][0]["url"]).split("/")[-2]
