"""The LAION aesthetic predictor: a stack of linear layers on a CLIP image embedding."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from fdfo_engine.rewards.clip import ClipEmbedder
from fdfo_engine.rewards.clip_inputs import OPEN_CLIP, tell_of_crop
from fdfo_engine.rewards.model_options import ModelOptions, ModelReward, Source, loaded
from fdfo_engine.rewards.registry import register
from fdfo_engine.runtime.errors import RewardError


class AestheticOptions(ModelOptions):
    """The CLIP model and the predictor on it."""

    model: str = "openai/clip-vit-large-patch14"
    """Hub id or folder of the CLIP model that the predictor was made for."""

    head: str = Field(default="trl-lib/ddpo-aesthetic-predictor", min_length=1)
    """Hub id or folder of the predictor."""

    head_file: str = Field(default="aesthetic-model.pth", min_length=1)
    """Its file there: `.safetensors`, or `.pth`, of which only tensors are read."""

    head_revision: str | None = None
    """Branch, tag or commit of the predictor on the hub; null takes what is on this machine, or else the newest."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `ModelOptions`."""
        return (*super().sources, self.head_source)

    @property
    def head_source(self) -> Source:
        """Where the predictor is."""
        return Source(self.head, self.head_revision or "main", self.allow_download)


@register("aesthetic")
class Aesthetic(ModelReward[AestheticOptions]):
    """How much people like the looks of an image, about 1..10, as in a survey; the prompt does not matter.

    LAION's predictor v2 (sac+logos+ava1-l14-linearMSE, Apache-2.0) on CLIP-L (MIT), which sees the middle square of an
    image, as OpenAI's code prepares it. One micro-batch of `batch_size`
    images at a time, on `device`; the head computes in float32; loads at the first call.
    """

    Options: type[AestheticOptions] = AestheticOptions

    @torch.no_grad()
    def _batch(self, _prompts: list[str], images: Tensor) -> Tensor:
        tell_of_crop("aesthetic", *images.shape[-2:])
        values = self._clip.embed_images(images)
        for weight, bias in self._layers:
            values = torch.nn.functional.linear(values, weight, bias)
        return values.squeeze(-1).cpu()

    @functools.cached_property
    def _clip(self) -> ClipEmbedder:
        return ClipEmbedder.load(self.options, self.options.model, OPEN_CLIP)

    @functools.cached_property
    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """The predictor has no nonlinearity: between its layers were only dropouts."""
        tensors = _head_tensors(self.options)
        numbers = sorted(int(name.split(".")[-2]) for name in tensors if name.endswith(".weight"))
        prefix = next(iter(tensors)).rpartition(".")[0].rpartition(".")[0]
        layers = [(tensors[f"{prefix}.{n}.weight"].float(), tensors[f"{prefix}.{n}.bias"].float()) for n in numbers]
        widths = [self._clip.network.config.projection_dim, *(len(weight) for weight, _ in layers)]
        if [weight.shape[1] for weight, _ in layers] != widths[:-1] or widths[-1] != 1:
            shapes = [tuple(weight.shape) for weight, _ in layers]
            raise RewardError(f"{self.options.head_file}: layers {shapes} do not lead from {widths[0]} numbers to one")
        device = self._clip.network.device
        return [(weight.to(device), bias.to(device)) for weight, bias in layers]


def _head_tensors(options: AestheticOptions) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = loaded("aesthetic predictor", options.head_source, functools.partial(_head_path, options.head_file))
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _head_path(file: str, head: str, *, revision: str, local_files_only: bool) -> Path:
    if Path(head).is_dir():
        return Path(head) / file
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(head, file, revision=revision, local_files_only=local_files_only))
