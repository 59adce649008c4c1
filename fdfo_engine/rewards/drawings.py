"""Pictures drawn by formula, nearly the same on every machine: what a reward is tried on where there is no model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CIRCLE_PROMPT = "a red circle"
SIGN_PROMPT = 'a sign that says "OPEN"'


class Picture(NamedTuple):
    """A prompt, and an image `[3, H, W]` in 0..1."""

    prompt: str
    image: Tensor


def pictures() -> list[Picture]:
    """A handful, good and bad: square ones, a tall one of odd sides, a wide one."""
    circle, noise = circle_and_noise(224)
    square, triangle = torch.ones(3, 128, 128), torch.ones(3, 201, 133)
    square[:, 24:72, 20:68] = _colour(0.1, 0.2, 0.8)
    rows, columns = torch.meshgrid(torch.arange(201), torch.arange(133), indexing="ij")
    is_inside = (rows > 40) & (rows < 160) & ((columns - 66).abs() < (rows - 40) / 3)
    triangle = torch.where(is_inside, _colour(0.1, 0.6, 0.2), triangle)
    return [
        Picture(CIRCLE_PROMPT, circle), Picture(CIRCLE_PROMPT, noise), Picture("a blue square", square),
        Picture("a green triangle", triangle), Picture(SIGN_PROMPT, sign(128, 256, "OPEN")),
        Picture(SIGN_PROMPT, sign(128, 256, "OVEN")),
    ]  # fmt: skip


def circle_and_noise(side: int = 256) -> Tensor:
    """`[2, 3, side, side]` in 0..1: a red circle on white, and noise."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    outside = (x.square() + y.square()).sqrt().sub(0.5).mul(side / 2).clamp(0, 1)  # one pixel of soft edge
    red = _colour(0.85, 0.1, 0.1)
    circle = red + (1 - red) * outside
    noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    return torch.stack([circle, noise])


def sign(height: int, width: int, text: str) -> Tensor:
    """`[3, height, width]` in 0..1: `text` in black in the middle of a white sign, in Pillow's own font."""
    canvas = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(size=min(height, width) / 5)
    ImageDraw.Draw(canvas).text((width / 2, height / 2), text, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


def _colour(*values: float) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)
