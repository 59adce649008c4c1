"""A vision-language model is asked about the image; the reward is how much it leans to the wanted answer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from fdfo_engine.config.section import refuse
from fdfo_engine.rewards.model_options import (
    ModelOptions,
    ModelReward,
    Source,
    device_of,
    loaded,
    read_auto,
    ready_network,
)
from fdfo_engine.rewards.pixels import to_pil
from fdfo_engine.rewards.questions import (
    PHOTOREALISM,
    QUALITY,
    SIDE_STEP,
    AnswerMass,
    QuestionOptions,
    asked,
    score_of,
    seen,
)
from fdfo_engine.rewards.registry import register
from fdfo_engine.runtime.console import visible, warn
from fdfo_engine.runtime.errors import RewardError


class VlmOptions(QuestionOptions, ModelOptions):
    """Any image-text-to-text chat model of transformers."""

    model: str = Field(default="Qwen/Qwen2.5-VL-7B-Instruct", min_length=1)
    """Hub id or folder."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type the model computes in; scores are float32 in any case."""

    batch_size: int = Field(default=8, ge=1)
    """Images asked about together."""

    preprocess: Literal["processor", "paper"] = "processor"
    """processor: 8 bits, bicubic, the aspect kept, then as the model's own processor does it. paper: as the paper's
    authors do it, a float square of `image_size` pixels a side, bilinear without antialiasing, the aspect not kept."""

    @model_validator(mode="after")
    def _fits_the_paper(self) -> Self:
        is_square = self.image_size is not None and self.image_size % SIDE_STEP == 0
        wrong = self.preprocess == "paper" and not is_square
        refuse([("image_size", f"with preprocess: paper it takes a multiple of {SIDE_STEP}")] if wrong else [])
        return self


class QualityOptions(VlmOptions):
    """`vlm` with another question."""

    question: str = QUALITY
    """What is asked; {prompt} stands for the image's prompt."""


class PhotorealismOptions(VlmOptions):
    """`vlm` with another question."""

    question: str = PHOTOREALISM
    """What is asked; {prompt} stands for the image's prompt."""


@register("vlm")
@register("vlm_alignment")
class VlmReward(ModelReward[VlmOptions]):
    """100 * sigmoid(logit(target) - logit(contrast)) at the first answer token: 0..100, percent.

    The question goes through the model's own chat template, the image first. Qwen2.5-VL-7B-Instruct by default
    (Apache-2.0; 17 GB in bfloat16), as in the paper. One micro-batch of `batch_size` images at a time, padded on the
    left, on `device`, in `dtype`; only the last token's logits are computed; loads at the first call. Where both
    answers hold less than `least_mass` of the probability the model answers something else: no opinion. `answer_mass`
    is logged. The processors of some families, Qwen-VL among them, need the package torchvision.
    """

    Options: type[VlmOptions] = VlmOptions

    def __init__(self, options: VlmOptions) -> None:
        super().__init__(options)
        self._mass = AnswerMass()

    @torch.no_grad()
    def _batch(self, prompts: list[str], images: Tensor) -> Tensor:
        chat, options = self._chat, self.options
        questions = [asked(options.question, prompt) for prompt in prompts]
        if options.preprocess == "paper":
            assert options.image_size is not None
            inputs = chat.inputs_of_squares(questions, float_squares(images, options.image_size))
        else:
            inputs = chat.inputs(questions, [to_pil(image) for image in seen(images, options.image_size)])
        logits = chat.network(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        target, contrast = logits[:, chat.target], logits[:, chat.contrast]
        mass = (torch.logaddexp(target, contrast) - logits.logsumexp(-1)).exp()
        self._mass.keep(mass)
        self._tell_strayed(mass, logits)
        return torch.where(mass >= options.least_mass, score_of(target - contrast), torch.nan).cpu()

    def take_notes(self) -> dict[str, Tensor]:
        """`answer_mass`: the probability of both answers together."""
        return self._mass.take()

    def _tell_strayed(self, mass: Tensor, logits: Tensor) -> None:
        """Warns of images that have no opinion; a mass that is no number is below every bound."""
        strayed = ~(mass >= self.options.least_mass)
        if not strayed.any():
            return
        first = int(strayed.nonzero()[0])
        likeliest = self._chat.processor.tokenizer.decode([int(logits[first].argmax())])
        options = self.options
        warn(
            f"{options.model}: no opinion on {int(strayed.sum())} images: {options.target!r} and {options.contrast!r} "
            f"hold less than least_mass of the first token's probability: {float(mass[first]):.1g}; the likeliest is "
            f"{visible(repr(likeliest))}",
            like=f"{options.model} has strayed from {options.target!r} and {options.contrast!r}",
        )

    @functools.cached_property
    def _chat(self) -> _Chat:
        options = self.options
        network, processor = _load(Source.of(options), options.dtype, device_of(options))
        return _Chat(network, processor, *(_token(processor.tokenizer, t) for t in (options.target, options.contrast)))


@register("vlm_quality")
class VlmQuality(VlmReward):
    """`vlm`, asked whether the image looks like the work of a professional; the prompt does not matter. 0..100."""

    Options = QualityOptions


@register("vlm_photorealism")
class VlmPhotorealism(VlmReward):
    """`vlm`, asked whether the image looks like a real photograph; the prompt does not matter. 0..100."""

    Options = PhotorealismOptions


@dataclass(frozen=True)
class _Chat:
    """A loaded chat model, its processor, and the two tokens that matter."""

    network: Any
    processor: Any
    target: int
    contrast: int

    def inputs(self, questions: list[str], pictures: list[Any], **image_settings: bool) -> Any:
        """What the network takes, one row a question; `image_settings` overrule the image processor's own."""
        texts = [self._templated(question, picture) for question, picture in zip(questions, pictures, strict=True)]
        # a template writes its own special tokens: adding them here would double the first
        inputs = self.processor(
            text=texts, images=[[p] for p in pictures], images_kwargs=image_settings, padding=True,
            add_special_tokens=False, return_tensors="pt",
        )  # fmt: skip
        return inputs.to(self.network.device, dtype=self.network.dtype)

    def inputs_of_squares(self, questions: list[str], squares: Tensor) -> Any:
        """The same of float images `[N, 3, side, side]` in 0..1, which the processor only normalises and cuts up.

        Raises:
            RewardError: the model takes no images of that size.
        """
        images = self.processor.image_processor
        if "image_grid_thw" not in images.model_input_names:
            raise RewardError("preprocess: paper takes a model that sees images of any size, such as Qwen2.5-VL")
        step, side = images.patch_size * images.merge_size, squares.shape[-1]
        if side % step:
            raise RewardError(f"preprocess: paper: image_size = {side}: of this model it takes a multiple of {step}")
        return self.inputs(questions, list(squares.cpu().numpy()), do_resize=False, do_rescale=False)

    def _templated(self, question: str, picture: Any) -> str:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text


def float_squares(images: Tensor, side: int) -> Tensor:
    """Images `[N, 3, H, W]` in 0..1 as `[N, 3, side, side]`, bilinear, without antialiasing, never rounded.

    Raises:
        ValueError: a pixel is NaN.
    """
    if torch.isnan(images).any():
        raise ValueError("images hold NaN")
    return functional.interpolate(images.float().clamp(0, 1), (side, side), mode="bilinear", align_corners=False)


@functools.cache
def _load(source: Source, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Network and processor; rewards that ask the same model different questions share them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = loaded("processor", source, AutoProcessor.from_pretrained)
    if not getattr(processor, "chat_template", None):
        raise RewardError(f"{source.model}: its processor has no chat template; takes an image-text-to-text chat model")
    processor.tokenizer.padding_side = "left"
    network = loaded("chat model", source, read_auto(AutoModelForImageTextToText, dtype))
    return ready_network(network, device), processor


def _token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise RewardError(f"{text!r} is not one token of this model ({ids}); take another target or contrast")
    return int(ids[0])
