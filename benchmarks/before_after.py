"""The picture of the README: held-out captions, drawn before and after a run of the demo, from the same noise.

`python -m benchmarks.before_after runs/shapes` writes `docs/shapes_before_after.png`: the first captions of the run's
held-out list, not selected, each image marked by what the judge says of it, which is right or wrong in every fact.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks import ROOT
from fdfo_engine.config import Config
from fdfo_engine.engine import Engine
from fdfo_engine.evaluation import evaluation_list
from fdfo_engine.rewards.shapes import shapes_strict
from fdfo_engine.runtime.picture import save_png, to_picture

COUNT, COLUMNS = 8, 2
SCALE = 3
GAP, BETWEEN = 28, 8
CAPTION_HEIGHT, HEADING_HEIGHT = 24, 20
PAPER, INK, RIGHT, WRONG = "white", "#1f2937", "#15803d", "#b91c1c"


def main() -> None:
    """Draws both and says how many are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="a run of configs/shapes.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "shapes_before_after.png")
    arguments = parser.parse_args()
    with Engine.resume(arguments.run_dir, trains=False) as engine:
        captions = evaluation_list(engine.config).prompts[:COUNT]
        seed = engine.config.evaluation.seed
        after, epochs = engine.generate(captions, seed=seed), engine.epoch
        config = engine.config
    before = untrained(config, captions, seed)
    was_right, is_right = (shapes_strict(captions, images) == 1 for images in (before, after))
    save_png(sheet(captions, (before, after), (was_right, is_right), epochs), arguments.out)
    print(f"of {COUNT}: right before {int(was_right.sum())}, after {int(is_right.sum())}, ", end="")
    print(f"before and not after {int((was_right & ~is_right).sum())}; written to {arguments.out}")


def untrained(config: Config, captions: list[str], seed: int) -> Tensor:
    """The same images by the base."""
    with Engine(config, trains=False) as engine:
        return engine.generate(captions, seed=seed)


def sheet(
    captions: list[str], images: tuple[Tensor, Tensor], are_right: tuple[Tensor, Tensor], epochs: int
) -> Image.Image:
    """Every caption over its two images `[N, 3, H, W]`; pixels stay what they are, each drawn as a square."""
    side = SCALE * images[0].shape[-1]
    width, height = 2 * side + BETWEEN, CAPTION_HEIGHT + HEADING_HEIGHT + side
    rows = -(-len(captions) // COLUMNS)
    size = (COLUMNS * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    paper = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(paper)
    for number, caption in enumerate(captions):
        row, column = divmod(number, COLUMNS)
        left, top = GAP + column * (width + GAP), GAP + row * (height + GAP)
        pen.text((left, top), caption, fill=INK, font=ImageFont.load_default(16))
        for which, heading in enumerate(("before", f"after {epochs} epochs")):
            x, y = left + which * (side + BETWEEN), top + CAPTION_HEIGHT
            is_right = bool(are_right[which][number])
            words, colour = (f"{heading}: right", RIGHT) if is_right else (f"{heading}: wrong", WRONG)
            pen.text((x, y), words, fill=colour, font=ImageFont.load_default(14))
            picture = to_picture(images[which][number]).resize((side, side), Image.Resampling.NEAREST)
            paper.paste(picture, (x, y + HEADING_HEIGHT))
    return paper


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
