"""How a published CLIP model was fed: what became of an image and of a text before they reached the network.

Weights alone are half of a published reward. Each rule here is the one its authors publish with their weights:
transformers' `CLIPProcessor` (PickScore), open_clip's and OpenAI's transform and tokenizer (CLIP, the aesthetic
predictor, GenEval's colours), and HPSv2's own fork of open_clip.
"""

from __future__ import annotations

import copy
import functools
import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fdfo_engine.rewards.pixels import center_crop, resize_bicubic, to_bytes
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError

_BICUBIC = 3
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PLAIN = re.compile(r"[\t\n -%'-~]*")  # printable ASCII without "&": what ftfy leaves alone
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # that CLIP's tokenizers cut a text into

ToPixels = Callable[[Tensor], Tensor]
"""From images `[N, 3, H, W]` in 0..1 to what a vision tower takes."""


@dataclass(frozen=True)
class ClipPreprocessing:
    """The shorter side is resized to the model's, the middle square cut out; through 8 bits, as from a PNG file."""

    shortest: int | None
    resized: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounds_crop: bool = False
    """Where an odd number of pixels is cut off: torchvision begins at the rounded half, transformers at the floor."""

    @classmethod
    def from_processor(cls, settings: dict[str, Any], *, rounds_crop: bool = False) -> ClipPreprocessing:
        """Reads `preprocessor_config.json`.

        Raises:
            RewardError: it asks for a filter other than bicubic, or for a crop larger than the resized image.
        """
        if settings.get("resample", _BICUBIC) != _BICUBIC:
            raise RewardError(f"image processor: resample = {settings['resample']}; only bicubic ({_BICUBIC}) is known")
        size, crop = settings.get("size", 224), settings.get("crop_size", 224)
        shortest = size if isinstance(size, int) else size.get("shortest_edge")
        resized = None if shortest is not None else (size["height"], size["width"])
        crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        crop = crop if settings.get("do_center_crop", True) else None
        if crop and (min(crop) < 1 or max(crop) > (shortest or min(resized or (0,)))):
            raise RewardError(f"image processor: crop_size {crop} is larger than size {size}")
        return cls(shortest, resized, crop, *_colours(settings), rounds_crop)

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 `[N, 3, h, w]`."""
        pixels = resize_bicubic(to_bytes(images), *self._size(images))
        if self.crop is not None:
            pixels = center_crop(pixels, *self.crop, rounds=self.rounds_crop)
        return _normalised(pixels.float() / 255, self.mean, self.std)

    def _size(self, images: Tensor) -> tuple[int, int]:
        if self.resized is not None:
            return self.resized
        assert self.shortest is not None
        height, width = images.shape[-2:]
        long = int(self.shortest * max(height, width) / min(height, width))
        return (self.shortest, long) if height <= width else (long, self.shortest)


@dataclass(frozen=True)
class PaddedPreprocessing:
    """HPSv2's: the longer side is resized to the model's and the rest padded with black, so that all is seen.

    Resized as a float tensor, not as 8 bits: bicubic, antialiased (torchvision's default since 0.17), not clamped.
    """

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, settings: dict[str, Any]) -> PaddedPreprocessing:
        """The model's side and colours, from `preprocessor_config.json`."""
        size = settings.get("size", 224)
        side = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
        return cls(side, *_colours(settings))

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 `[N, 3, side, side]`."""
        pixels = to_bytes(images).float() / 255
        height, width = pixels.shape[-2:]
        scale = self.side / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        if scale != 1:
            pixels = functional.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
        below, beside = self.side - size[0], self.side - size[1]
        top, left = below // 2, beside // 2
        return _normalised(functional.pad(pixels, (left, beside - left, top, below - top)), self.mean, self.std)


@dataclass(frozen=True)
class PublishedRule:
    """What a model was published with."""

    preprocessing: Callable[[dict[str, Any]], ToPixels]
    """From `preprocessor_config.json` to the image transform."""

    crops: bool
    """Whether of an image that is not square only the middle is seen."""

    cleans_text: bool
    """Whether texts go through `clean_text`."""


_rounding = functools.partial(ClipPreprocessing.from_processor, rounds_crop=True)
TRANSFORMERS = PublishedRule(ClipPreprocessing.from_processor, crops=True, cleans_text=False)
OPEN_CLIP = PublishedRule(_rounding, crops=True, cleans_text=True)
HPSV2 = PublishedRule(PaddedPreprocessing.from_processor, crops=False, cleans_text=True)


def clean_text(text: str) -> str:
    """A prompt as the tokenizers of OpenAI's CLIP, open_clip and HPSv2 first make it.

    Broken encodings, ligatures and curly quotes are repaired by ftfy, HTML entities resolved twice, white space made
    single spaces, letters lower case.

    Raises:
        EnvironmentProblem: the text is not plain ASCII, and ftfy is not installed.
    """
    repaired = text if _PLAIN.fullmatch(text) else _repaired(text)
    return " ".join(html.unescape(html.unescape(repaired)).split()).lower()


def require_cleaning(text: str) -> None:
    """Raises what `clean_text` would."""
    if not _PLAIN.fullmatch(text):
        _repaired("")


def without_own_cleaning(tokenizer: Any) -> Any:
    """A copy of transformers' CLIP tokenizer for texts that are clean: it changes nothing, and no text is an end mark.

    By itself it would compose accents that HTML entities have left apart, and read `<|endoftext|>` in a prompt as one.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers import CLIPTokenizer

    if not isinstance(tokenizer, CLIPTokenizer):
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    backend = plain.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    plain.split_special_tokens = True
    return plain


@functools.cache
def tell_of_crop(reward: str, height: int, width: int) -> None:
    """Says, once for a reward and a size, that only the middle square of an image counts."""
    if height != width:
        unseen = 1 - min(height, width) / max(height, width)
        warn(
            f"{reward}: sees the middle square of {height} x {width} images only, by its published rule; "
            f"{100 * unseen:.0f}% of each has no effect on its score"
        )


def _repaired(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise EnvironmentProblem(
            "a prompt that is not plain ASCII is repaired by the package ftfy before CLIP and HPSv2 read it: "
            f"{error}; pip install ftfy"
        ) from error
    repaired: str = ftfy.fix_text(text)
    return repaired


def _colours(settings: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = settings.get("image_mean") or _MEAN, settings.get("image_std") or _STD
    return tuple(mean), tuple(std)


def _normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    means, deviations = (pixels.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return (pixels - means) / deviations
