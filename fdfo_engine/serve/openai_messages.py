"""Bodies in the shape of OpenAI's API, for the images face."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fdfo_engine.serve.messages import Answer, Prompt

MAX_IMAGES = 16


class GenerateImages(BaseModel):
    """As OpenAI's `images.generate`; fields it has and this server does not are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    prompt: Prompt
    model: Annotated[str, StringConstraints(max_length=200)] = "run"
    """`base`, `run`, or a checkpoint: `run@epoch_000040`."""
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = 1
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    size: Annotated[str, StringConstraints(max_length=20)] | None = None
    """`auto`, or the run's own `WIDTHxHEIGHT`."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    user: str | None = None
    quality: str | None = None
    style: str | None = None
    background: str | None = None


class ImageItem(Answer):
    """One image."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class ImagesBody(Answer):
    """As OpenAI's answer."""

    created: int
    data: list[ImageItem]


class ModelItem(Answer):
    """A state of the weights."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fdfo_engine"


class ModelsBody(Answer):
    """As OpenAI's answer."""

    object: Literal["list"] = "list"
    data: list[ModelItem]


class OpenAIErrorDetail(Answer):
    """As OpenAI's errors."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(Answer):
    """As OpenAI's errors."""

    error: OpenAIErrorDetail
