"""The folder of an evaluation: `evaluation.json`, the pictures that its page shows, and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fdfo_engine.report.evaluation_page import PICTURES_NAME, RESULT_NAME, shown_prompts, write_evaluation_page
from fdfo_engine.runtime.durable import plain_json, replace_file
from fdfo_engine.runtime.picture import save_png, to_picture


def write_evaluation(folder: Path, result: Mapping[str, Any], previews: Mapping[str, Tensor], pictures: int) -> Path:
    """Writes the folder and returns the path of its page.

    Args:
        folder: made if absent.
        result: see `evaluation.compare.summarize`; numbers that are not finite become null.
        previews: uint8 `[P, 3, h, w]` by the name of a set of weights.
        pictures: how many of the first prompts are shown; winners and losers are shown besides. 0 keeps none.

    Raises:
        CheckpointError: the storage refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in previews.items():
        for index in shown_prompts(result, pictures):
            save_png(to_picture(images[index].float() / 255), folder / PICTURES_NAME / name / f"{index:05d}.png")
    text = json.dumps(plain_json({**result, "pictures_shown": pictures}), indent=1)
    replace_file(folder / RESULT_NAME, text.encode())
    return write_evaluation_page(folder)
