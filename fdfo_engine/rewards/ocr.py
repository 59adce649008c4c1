"""Is the text that a prompt asks for, in quotes, written in the image? Read by the package rapidocr-onnxruntime."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fdfo_engine.config.section import Section
from fdfo_engine.rewards.drawings import SIGN_PROMPT, sign
from fdfo_engine.rewards.pixels import to_bytes
from fdfo_engine.rewards.registry import register
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.runtime.errors import EnvironmentProblem

_INSTALL = "pip install 'fdfo-engine[ocr]'"
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»')


class OcrOptions(Section):
    """How the reader runs."""

    threads: int = Field(default=1, ge=1)
    """CPU threads of the reader, on each rank."""


@register("ocr")
class OcrReward(Reward):
    """1 - edit distance / length between the text asked for and the text read, 0..1; 1 is every letter right.

    What a prompt has between double quotes, "...", is asked for; case, spaces and punctuation don't count, since the
    reader drops many of them. Where a prompt asks for nothing, every image scores 1: none is preferred. Texts are read
    one image at a time, on the CPU, in float32, by the models inside rapidocr-onnxruntime (PP-OCR, Apache-2.0: Latin
    letters and Chinese), about a second an image and thread. Extra: `pip install 'fdfo-engine[ocr]'`.
    """

    Options: type[OcrOptions] = OcrOptions

    def __init__(self, options: OcrOptions) -> None:
        self.options = options

    def require_ready(self) -> None:
        """Asks whether the reader is installed.

        Raises:
            EnvironmentProblem: it is not.
        """
        if importlib.util.find_spec("rapidocr_onnxruntime") is None:
            raise EnvironmentProblem(f"reward ocr: rapidocr-onnxruntime is not installed; {_INSTALL}")

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Scores `[N]` of images `[N, 3, H, W]`."""
        return torch.tensor([self._score(p, image) for p, image in zip(prompts, to_bytes(images), strict=True)])

    def self_test_case(self, side: int) -> tuple[str, Tensor]:
        """A word written as asked for, and an empty sign."""
        return SIGN_PROMPT, torch.stack([sign(side, side, "OPEN"), sign(side, side, "")])

    def _score(self, prompt: str, image: Tensor) -> float:
        wanted = letters(" ".join(asked_text(prompt)))
        return similarity(wanted, letters(self._read(image))) if wanted else 1.0

    def _read(self, image: Tensor) -> str:
        """All lines, from top to bottom."""
        lines, _ = self._reader(image.permute(1, 2, 0).flip(-1).contiguous().cpu().numpy())  # it takes BGR
        return " ".join(text for _, text, _ in lines or [])

    @functools.cached_property
    def _reader(self) -> Any:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise EnvironmentProblem(f"reward ocr: {error}; {_INSTALL}") from error
        return RapidOCR(intra_op_num_threads=self.options.threads, inter_op_num_threads=1)


def asked_text(prompt: str) -> list[str]:
    """What stands between double quotes in a prompt."""
    return [next(filter(None, groups)) for groups in _QUOTED.findall(prompt)]


def letters(text: str) -> str:
    """Letters and digits only, case folded."""
    return "".join(c for c in text.casefold() if c.isalnum())


def similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / the longer length."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return 1.0 - row[-1] / max(len(one), len(other), 1)
