"""Does the image show the objects that its prompt asks for, in number, colour and place? As GenEval checks it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fdfo_engine.rewards.clip import ClipEmbedder, ClipOptions
from fdfo_engine.rewards.clip_inputs import OPEN_CLIP
from fdfo_engine.rewards.geneval_rules import (
    COLORS,
    Box,
    Detected,
    Requirements,
    fulfilled,
    read_requirements,
    without_doubles,
)
from fdfo_engine.rewards.model_options import (
    ModelOptions,
    ModelReward,
    Source,
    device_of,
    loaded,
    read_auto,
    ready_network,
)
from fdfo_engine.rewards.pixels import to_bytes, to_pil
from fdfo_engine.rewards.registry import register
from fdfo_engine.runtime.console import visible
from fdfo_engine.runtime.errors import RewardError

MAX_OBJECTS = 16
"""Objects of a class that are looked at in one image, as in GenEval."""

_FAMILIES = ("owlv2", "owlvit")


class GenevalOptions(ModelOptions):
    """The detector, the requirements, and how sure is sure enough."""

    model: str = Field(default="google/owlv2-base-patch16-ensemble", min_length=1)
    """Hub id or folder of the detector: OWLv2 or OWL-ViT."""

    metadata: str = Field(min_length=1)
    """File of requirements by prompt, in GenEval's form: .jsonl with `prompt`, `include`, `exclude`."""

    clip: str = Field(default="openai/clip-vit-large-patch14", min_length=1)
    """Hub id or folder of the CLIP model that tells colours."""

    score: Literal["fraction", "strict"] = "fraction"
    """fraction: share of the requirements that hold; strict: 1 where all hold, else 0, as in GenEval."""

    threshold: float = Field(default=0.3, gt=0, lt=1)
    """Least confidence of an object."""

    count_threshold: float = Field(default=0.3, gt=0, lt=1)
    """Least confidence of an object where more objects than asked for are wrong."""

    overlap: float = Field(default=0.5, gt=0, le=1)
    """Boxes of one class that share more than this of their union are one object."""

    batch_size: int = Field(default=8, ge=1)
    """Images that the detector sees together."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `ModelOptions`."""
        return (*super().sources, Source.of(self, self.clip))

    @property
    def networks(self) -> tuple[str, ...]:
        """See `ModelOptions`."""
        return self.model, self.clip


@register("geneval")
class Geneval(ModelReward[GenevalOptions]):
    """Share of a prompt's requirements that its image fulfils, 0..1, or 0 and 1 with `score: strict`.

    Requirements are objects by class and number, their colours and relative places, and classes there must be fewer of;
    they come with the prompts, in `metadata`. Objects are found by an open-vocabulary detector,
    google/owlv2-base-patch16-ensemble by default (Apache-2.0), colours told by CLIP-L (MIT) from what is in the box:
    GenEval's own Mask2Former is closed-set and masks the background, so figures are near its own, not equal. One
    micro-batch of `batch_size` images at a time, on `device`, in `dtype`; loads at the first call.
    """

    Options: type[GenevalOptions] = GenevalOptions

    def __init__(self, options: GenevalOptions) -> None:
        super().__init__(options)
        self._requirements = read_requirements(Path(options.metadata).expanduser())

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Asks whether all of `prompts` have requirements.

        Raises:
            RewardError: one has none.
        """
        for prompt in prompts:
            self._of(prompt)

    @torch.no_grad()
    def _batch(self, prompts: list[str], images: Tensor) -> Tensor:
        wanted = [self._of(prompt) for prompt in prompts]
        pixels = to_bytes(images)
        found = self._detector.find(pixels, [one.classes for one in wanted], min(self._thresholds))
        rows = zip(wanted, found, pixels, strict=True)
        return torch.tensor([self._score(*row) for row in rows])

    def _score(self, wanted: Requirements, found: dict[str, list[Detected]], image: Tensor) -> float:
        least = self._thresholds[wanted.counts]
        objects = {name: self._objects(boxes, least) for name, boxes in found.items()}
        facts = fulfilled(wanted, objects, lambda name, box: self._colors.of(name, cut_out(image, box)))
        return sum(facts) / len(facts) if self.options.score == "fraction" else float(all(facts))

    def _objects(self, boxes: list[Detected], least: float) -> list[Detected]:
        sure = [one for one in boxes if one.confidence > least]
        return without_doubles(sure, self.options.overlap)[:MAX_OBJECTS]

    def _of(self, prompt: str) -> Requirements:
        found = self._requirements.get(prompt.strip())
        if found is None:
            raise RewardError(
                f"geneval: {self.options.metadata} has no requirements for the prompt {visible(prompt)[:100]!r}; it "
                "takes the prompts of that file, such as prompts.source = the same file"
            )
        return found

    @property
    def _thresholds(self) -> tuple[float, float]:
        return self.options.threshold, self.options.count_threshold

    @functools.cached_property
    def _detector(self) -> Detector:
        return Detector.load(self.options)

    @functools.cached_property
    def _colors(self) -> Colors:
        own = self.options
        clip = ClipOptions(model=own.clip, dtype=own.dtype, device=own.device, allow_download=own.allow_download)
        return Colors(ClipEmbedder.load(clip, own.clip, OPEN_CLIP))


def cut_out(image: Tensor, box: Box) -> Tensor:
    """What of an image `[3, H, W]` lies in a box, whole pixels and at least one."""
    height, width = image.shape[-2:]
    left, top = min(int(max(box.left, 0)), width - 1), min(int(max(box.top, 0)), height - 1)
    right, bottom = min(round(box.right), width), min(round(box.bottom), height)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


@dataclass(frozen=True)
class Detector:
    """A loaded OWL-ViT or OWLv2."""

    network: Any
    processor: Any

    @classmethod
    def load(cls, options: GenevalOptions) -> Detector:
        """The model and its processor.

        Raises:
            RewardError, EnvironmentProblem: see `model_options.loaded`; RewardError too for another kind of model.
        """
        return _load_detector(Source.of(options), options.dtype, device_of(options))

    def find(self, pixels: Tensor, classes: list[list[str]], least: float) -> list[dict[str, list[Detected]]]:
        """Objects by class in each of the uint8 images `[N, 3, H, W]`, of its own `classes`, above `least`."""
        most = max(map(len, classes))
        # repeating its own last class leaves an image's result as if it were alone
        names = [[*own, *own[-1:] * (most - len(own))] for own in classes]
        inputs = self.processor(
            text=[[f"a photo of a {name}" for name in own] for own in names], images=[to_pil(p) for p in pixels],
            truncation=True, return_tensors="pt",
        ).to(self.network.device, dtype=self.network.dtype)  # fmt: skip
        outputs = self.network(**inputs)
        outputs.pred_boxes = outputs.pred_boxes.float()  # bfloat16 knows every fourth pixel of a large image
        sizes = [tuple(pixels.shape[-2:])] * len(pixels)
        results = self.processor.post_process_grounded_object_detection(
            outputs, threshold=least, target_sizes=sizes, text_labels=names
        )
        return [_by_class(result, own) for result, own in zip(results, classes, strict=True)]


class Colors:
    """Tells the colour of an object by CLIP, among `COLORS`."""

    def __init__(self, clip: ClipEmbedder) -> None:
        self._clip = clip
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, crop: Tensor) -> str:
        """The colour of the object `name` in a uint8 crop `[3, h, w]`."""
        if name not in self._kept:
            self._kept[name] = self._texts(name)
        likeness = self._kept[name] @ self._clip.embed_images(crop[None].float() / 255)[0]
        return COLORS[int(likeness.argmax())]

    def _texts(self, name: str) -> Tensor:
        """`[colours, D]`: the mean of each colour's texts, of unit length."""
        rests = (f" {name}", f"-colored {name}", " object")
        texts = [f"a photo of a {color}{rest}" for color in COLORS for rest in rests]
        each = self._clip.embed_text(texts).view(len(COLORS), len(rests), -1)
        return functional.normalize(each.mean(1), dim=-1)


def _by_class(result: dict[str, Any], classes: list[str]) -> dict[str, list[Detected]]:
    found: dict[str, list[Detected]] = {name: [] for name in classes}
    for name, box, confidence in zip(
        result["text_labels"], result["boxes"].tolist(), result["scores"].tolist(), strict=True
    ):
        found[name].append(Detected(Box(*box), confidence))
    return found


@functools.cache
def _load_detector(source: Source, dtype: str, device: torch.device) -> Detector:
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    network = loaded("detector", source, read_auto(AutoModelForZeroShotObjectDetection, dtype))
    if network.config.model_type not in _FAMILIES:
        raise RewardError(f"{source.model}: a {network.config.model_type}; geneval takes {' or '.join(_FAMILIES)}")
    return Detector(ready_network(network, device), loaded("processor", source, AutoProcessor.from_pretrained))
