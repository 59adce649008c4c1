"""What a vision-language model is asked about an image: shared by the local model and the server."""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fdfo_engine.config.section import Section, refuse
from fdfo_engine.rewards.pixels import resize_bicubic, to_bytes

ALIGNMENT = 'Does this image match the caption "{prompt}"? Answer Yes or No.'
QUALITY = "Does this image look like the work of a professional? Answer Yes or No."
PHOTOREALISM = "Does this image look like a real photograph? Answer Yes or No."

SIDE_STEP = 28
"""Pixels that Qwen-VL makes one token of: a side that is a multiple is not resized again."""


class QuestionOptions(Section):
    """A question whose first answer token tells."""

    question: str = Field(default=ALIGNMENT, min_length=1)
    """What is asked; {prompt} stands for the image's prompt."""

    target: str = Field(default="Yes", min_length=1)
    """The answer that is wanted; one token."""

    contrast: str = Field(default="No", min_length=1, validate_default=True)
    """The answer it is weighed against; one token."""

    least_mass: float = Field(default=0.01, gt=0, le=1)
    """Probability that both answers must hold together; where they hold less, the model answers something else, and
    there is no opinion."""

    image_size: int | None = Field(default=504, ge=SIDE_STEP)
    """Side of a square with as many pixels as the image is resized to (sides: multiples of 28); null keeps its own."""

    @field_validator("contrast")
    @classmethod
    def _differs(cls, contrast: str, info: object) -> str:
        target = getattr(info, "data", {}).get("target")
        refuse([("", "is the target too: there is nothing to weigh")] if contrast == target else [])
        return contrast


def asked(question: str, prompt: str) -> str:
    """The question about one image; a prompt is text, whatever braces it holds."""
    return question.replace("{prompt}", prompt)


def seen(images: Tensor, image_size: int | None) -> Tensor:
    """Images `[N, 3, H, W]` in 0..1 as uint8 of the size that the model is shown."""
    pixels = to_bytes(images)
    if image_size is None:
        return pixels
    height, width = pixels.shape[-2:]
    scale = image_size / math.sqrt(height * width)
    return resize_bicubic(pixels, *(max(1, round(side * scale / SIDE_STEP)) * SIDE_STEP for side in (height, width)))


class AnswerMass:
    """The probability of both answers together, of every image since it was last taken: what a run logs."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []

    def keep(self, mass: Tensor) -> None:
        """Adds images' values `[n]`; NaN where the answer had no probabilities."""
        self._values.append(mass.detach().float().cpu())

    def take(self) -> dict[str, Tensor]:
        """All that were kept, `[n]`, as `Reward.take_notes` gives them."""
        taken, self._values = self._values, []
        return {"answer_mass": torch.cat([torch.zeros(0), *taken])}


def score_of(target_minus_contrast: Tensor) -> Tensor:
    """100 * sigmoid of the difference of two logits, or of two log-probabilities, which is the same."""
    return 100 * torch.sigmoid(target_minus_contrast.double()).float()
