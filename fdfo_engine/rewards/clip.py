"""Rewards by the angle between a CLIP model's embeddings of text and image: CLIP score, PickScore, HPSv2."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.rewards.model_options import ModelOptions, ModelReward, Source, device_of, loaded, ready_network
from fdfo_engine.rewards.pixels import center_crop, resize_bicubic, to_bytes
from fdfo_engine.rewards.registry import register
from fdfo_engine.runtime.errors import RewardError

_BICUBIC = 3
_LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipOptions(ModelOptions):
    """A `CLIPModel` of transformers."""

    model: str = _LAION_H
    """Hub id or folder."""

    processor: str | None = None
    """Where tokenizer and image preprocessing come from; null takes them from `model`."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `ModelOptions`."""
        return (*super().sources, Source.of(self, self.processor))


class PickScoreOptions(ClipOptions):
    """PickScore v1 keeps its processor elsewhere."""

    model: str = "yuvalkirstain/PickScore_v1"
    """Hub id or folder."""

    processor: str | None = _LAION_H
    """Where tokenizer and image preprocessing come from; null takes them from `model`."""


class Hpsv2Options(ClipOptions):
    """HPSv2 as a `CLIPModel`: its authors publish an open_clip checkpoint, which transformers does not read."""

    model: str = "adams-story/HPSv2-hf"
    """Hub id or folder."""

    processor: str | None = _LAION_H
    """Where tokenizer and image preprocessing come from; null takes them from `model`."""


@register("clip")
class ClipReward(ModelReward[ClipOptions]):
    """100 * cosine(text, image), about 0..50, in hundredths; prompts are cut at the model's limit (77 tokens).

    CLIP-H by default (laion/CLIP-ViT-H-14-laion2B-s32B-b79K, MIT); for CLIP-L `model: openai/clip-vit-large-patch14`
    (MIT). One micro-batch of `batch_size` images at a time, on `device`, in `dtype`; loads at the first call.
    """

    Options: type[ClipOptions] = ClipOptions
    is_scaled_by_model = False

    @torch.no_grad()
    def _batch(self, prompts: list[str], images: Tensor) -> Tensor:
        clip = self._clip
        cosine = (clip.embed_text(prompts) * clip.embed_images(images)).sum(-1)
        scale = clip.network.logit_scale.float().exp() if self.is_scaled_by_model else 100.0
        return (scale * cosine).cpu()

    @functools.cached_property
    def _clip(self) -> ClipEmbedder:
        return ClipEmbedder.load(self.options, self.options.processor or self.options.model)


@register("pickscore")
class PickScore(ClipReward):
    """PickScore v1, logit_scale * cosine(text, image): about 15..27, unitless; the paper's main reward.

    yuvalkirstain/PickScore_v1: CLIP-H tuned on people's choices (code MIT; for the weights see its model card). Batch,
    device and dtype as `clip`.
    """

    Options = PickScoreOptions
    is_scaled_by_model = True


@register("hpsv2")
class Hpsv2(ClipReward):
    """Human Preference Score v2, 100 * cosine(text, image): about 20..35, in hundredths.

    A conversion of xswu/HPSv2 (Apache-2.0) to transformers; give your own conversion of v2.1 as `model`. Batch, device
    and dtype as `clip`.
    """

    Options = Hpsv2Options


@dataclass(frozen=True)
class ClipPreprocessing:
    """From pixels to what the vision tower takes, as its repository's image processor does it."""

    shortest: int | None
    resized: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, settings: dict[str, Any]) -> ClipPreprocessing:
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
        mean, std = settings.get("image_mean") or _MEAN, settings.get("image_std") or _STD
        return cls(shortest, resized, crop, tuple(mean), tuple(std))

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 `[N, 3, h, w]` of images in 0..1, through 8 bits as from a PNG file."""
        pixels = resize_bicubic(to_bytes(images), *self._size(images))
        if self.crop is not None:
            pixels = center_crop(pixels, *self.crop)
        mean, std = (pixels.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _size(self, images: Tensor) -> tuple[int, int]:
        if self.resized is not None:
            return self.resized
        assert self.shortest is not None
        height, width = images.shape[-2:]
        long = int(self.shortest * max(height, width) / min(height, width))
        return (self.shortest, long) if height <= width else (long, self.shortest)


@dataclass(frozen=True)
class ClipEmbedder:
    """A loaded CLIP model: unit embeddings, float32."""

    network: Any
    tokenizer: Any
    preprocess: ClipPreprocessing

    @classmethod
    def load(cls, options: ModelOptions, processor: str) -> ClipEmbedder:
        """The model and its processor; rewards on the same weights share them.

        Raises:
            RewardError, EnvironmentProblem: see `model_options.loaded`.
        """
        own = Source.of(options)
        return _load_embedder(own, Source.of(options, processor), options.dtype, device_of(options))

    def embed_text(self, prompts: list[str]) -> Tensor:
        """`[N, D]`; every text is padded to the model's limit, so that a text's embedding has one batch shape."""
        limit = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        features = self.network.get_text_features(
            input_ids=tokens["input_ids"].to(self.network.device),
            attention_mask=tokens["attention_mask"].to(self.network.device),
        )
        return _unit(features)

    def embed_images(self, images: Tensor) -> Tensor:
        """`[N, D]` of images `[N, 3, H, W]` in 0..1."""
        pixels = self.preprocess(images.to(self.network.device))
        return _unit(self.network.get_image_features(pixel_values=pixels.to(self.network.dtype)))


@functools.cache
def _load_embedder(source: Source, processor: Source, dtype: str, device: torch.device) -> ClipEmbedder:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = loaded("image processor", processor, ImageProcessingMixin.get_image_processor_dict)
    tokenizer = loaded("tokenizer", processor, AutoTokenizer.from_pretrained)
    read = functools.partial(CLIPModel.from_pretrained, dtype=getattr(torch, dtype))
    network = loaded("CLIP model", source, read)
    return ClipEmbedder(ready_network(network, device), tokenizer, ClipPreprocessing.from_processor(settings))


def _unit(features: Any) -> Tensor:
    """Some releases of transformers return the embedding, others an output that holds it."""
    embedding: Tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(embedding.float(), dim=-1)
