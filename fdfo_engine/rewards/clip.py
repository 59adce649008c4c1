"""Rewards by the angle between a CLIP model's embeddings of text and image: CLIP score, PickScore, HPSv2."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.rewards.clip_inputs import (
    HPSV2,
    OPEN_CLIP,
    TRANSFORMERS,
    PublishedRule,
    ToPixels,
    clean_text,
    require_cleaning,
    tell_of_crop,
    without_own_cleaning,
)
from fdfo_engine.rewards.model_options import ModelOptions, ModelReward, Source, device_of, loaded, ready_network
from fdfo_engine.rewards.registry import register

_LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


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
    (MIT). Images and texts are prepared as open_clip and OpenAI's code do it: the middle square, texts cleaned. One
    micro-batch of `batch_size` images at a time, on `device`, in `dtype`; loads at the first call.
    """

    Options: type[ClipOptions] = ClipOptions
    name = "clip"
    rule = OPEN_CLIP
    is_scaled_by_model = False

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Asks whether the prompts can be cleaned as the published tokenizer does it.

        Raises:
            EnvironmentProblem: one is not plain ASCII, and ftfy is not installed.
        """
        for prompt in prompts if self.rule.cleans_text else ():
            require_cleaning(prompt)

    @torch.no_grad()
    def _batch(self, prompts: list[str], images: Tensor) -> Tensor:
        if self.rule.crops:
            tell_of_crop(self.name, *images.shape[-2:])
        clip = self._clip
        cosine = (clip.embed_text(prompts) * clip.embed_images(images)).sum(-1)
        scale = clip.network.logit_scale.float().exp() if self.is_scaled_by_model else 100.0
        return (scale * cosine).cpu()

    @functools.cached_property
    def _clip(self) -> ClipEmbedder:
        return ClipEmbedder.load(self.options, self.options.processor or self.options.model, self.rule)


@register("pickscore")
class PickScore(ClipReward):
    """PickScore v1, logit_scale * cosine(text, image): about 15..27, unitless; the paper's main reward.

    yuvalkirstain/PickScore_v1: CLIP-H tuned on people's choices (code MIT; for the weights see its model card). Images
    and texts are prepared as its authors do it, by transformers' processor: the middle square, texts in lower case but
    not cleaned. Batch, device and dtype as `clip`.
    """

    Options = PickScoreOptions
    name = "pickscore"
    rule = TRANSFORMERS
    is_scaled_by_model = True


@register("hpsv2")
class Hpsv2(ClipReward):
    """Human Preference Score v2, 100 * cosine(text, image): about 20..35, in hundredths.

    A conversion of xswu/HPSv2 (Apache-2.0) to transformers; give your own conversion of v2.1 as `model`. Images and
    texts are prepared as its authors' package does it: the longer side resized, the rest padded with black, texts
    cleaned. Batch, device and dtype as `clip`.
    """

    Options = Hpsv2Options
    name = "hpsv2"
    rule = HPSV2


@dataclass(frozen=True)
class ClipEmbedder:
    """A loaded CLIP model: unit embeddings, float32."""

    network: Any
    tokenizer: Any
    preprocess: ToPixels
    cleans_text: bool

    @classmethod
    def load(cls, options: ModelOptions, processor: str, rule: PublishedRule) -> ClipEmbedder:
        """The model, and its processor used by `rule`; rewards on the same weights share them.

        Raises:
            RewardError, EnvironmentProblem: see `model_options.loaded`.
        """
        network = _load_network(Source.of(options), options.dtype, device_of(options))
        settings, tokenizer = _load_processor(Source.of(options, processor))
        tokenizer = without_own_cleaning(tokenizer) if rule.cleans_text else tokenizer
        return cls(network, tokenizer, rule.preprocessing(settings), rule.cleans_text)

    def embed_text(self, prompts: list[str]) -> Tensor:
        """`[N, D]`; every text is padded to the model's limit, so that a text's embedding has one batch shape."""
        texts = [clean_text(prompt) for prompt in prompts] if self.cleans_text else prompts
        limit = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
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
def _load_network(source: Source, dtype: str, device: torch.device) -> Any:
    from transformers import CLIPModel

    read = functools.partial(CLIPModel.from_pretrained, dtype=getattr(torch, dtype))
    return ready_network(loaded("CLIP model", source, read), device)


@functools.cache
def _load_processor(source: Source) -> tuple[dict[str, Any], Any]:
    """The settings of the image processor, and the tokenizer."""
    from transformers import AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = loaded("image processor", source, ImageProcessingMixin.get_image_processor_dict)
    return settings, loaded("tokenizer", source, AutoTokenizer.from_pretrained)


def _unit(features: Any) -> Tensor:
    """Some releases of transformers return the embedding, others an output that holds it."""
    embedding: Tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(embedding.float(), dim=-1)
