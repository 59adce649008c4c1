"""The VLM reward from a server with OpenAI's chat API (vLLM, SGLang): from the top log-probabilities of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fdfo_engine.rewards.json_server import BadReplyError, JsonServer, ServerOptions
from fdfo_engine.rewards.pixels import png_base64
from fdfo_engine.rewards.questions import QuestionOptions, asked, score_of, seen
from fdfo_engine.rewards.registry import register
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.runtime.console import visible, warn
from fdfo_engine.runtime.errors import RewardError


class VlmServerOptions(QuestionOptions, ServerOptions):
    """A server and what it is asked."""

    url: str = Field(default="http://127.0.0.1:8000/v1", min_length=1)
    """Up to and with `/v1`."""

    model: str = Field(default="Qwen/Qwen2.5-VL-7B-Instruct", min_length=1)
    """Name under which the server has the model."""

    top_logprobs: int = Field(default=20, ge=2)
    """Log-probabilities asked for; both answers must be among them. vLLM and OpenAI allow 20 unless told otherwise."""

    extra: dict[str, Any] = Field(default={})
    """Further keys of the request, such as `{chat_template_kwargs: {enable_thinking: false}}`."""


class _Message(BaseModel):
    """Servers add keys of their own: only what is read is checked."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Candidate(_Message):
    token: str
    logprob: float


class _Token(_Message):
    top_logprobs: list[_Candidate] = Field(min_length=1)


class _Logprobs(_Message):
    content: list[_Token] = Field(min_length=1)


class _Choice(_Message):
    logprobs: _Logprobs


class _Reply(_Message):
    choices: list[_Choice] = Field(min_length=1)


class _Model(_Message):
    id: str


class _Models(_Message):
    data: list[_Model]


@register("vlm_server")
class VlmServerReward(Reward):
    """As `vlm`: 100 * sigmoid(logprob(target) - logprob(contrast)) of the first answer token, 0..100, percent.

    Log-probabilities differ as the logits do. One request an image, `concurrency` at a time; batch, dtype and device
    are the server's. An answer without both tokens among its `top_logprobs` is no opinion, never a number. vLLM's
    `--api-key` guards its API paths only: bind it to the loopback. The key comes from env FDFO_REWARD_KEY. Weights:
    Qwen2.5-VL-7B-Instruct (Apache-2.0) by default.
    """

    Options: type[VlmServerOptions] = VlmServerOptions

    def __init__(self, options: VlmServerOptions) -> None:
        self.options = options
        self._server = JsonServer(options)

    def require_ready(self) -> None:
        """Asks for the list of models.

        Raises:
            RewardError: no such server, or it has no such model.
        """
        reply = self._server.require_ready("GET", "/models")
        try:
            there = [model.id for model in _Models.model_validate(reply).data]
        except ValidationError as error:
            raise RewardError(f"{self.options.url}/models: takes a list of models, got {str(reply)[:200]!r}") from error
        if self.options.model not in there:
            raise RewardError(f"{self.options.url}: has no model {self.options.model!r}; it has {', '.join(there)}")

    def cancel(self) -> None:
        """Ends all waiting for the server."""
        self._server.cancel()

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Scores `[N]` of images `[N, 3, H, W]`; NaN where the server's answer tells nothing."""
        questions = [asked(self.options.question, prompt) for prompt in prompts]
        pixels = seen(images, self.options.image_size)
        return torch.stack(self._server.for_all(self._score, list(zip(questions, pixels, strict=True))))

    def _score(self, request: tuple[str, Tensor]) -> Tensor:
        message = self._message(*request)
        for last in (False, True):
            try:
                return score_of(self._difference(self._server.ask("/chat/completions", message)))
            except BadReplyError as error:
                warn(f"{self.options.url}: {error}; {'no opinion on one image' if last else 'asking once more'}")
        return torch.tensor(torch.nan)

    def _message(self, question: str, image: Tensor) -> dict[str, Any]:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64(image)}"}}
        return {
            "model": self.options.model,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
            "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": self.options.top_logprobs,
            **self.options.extra,
        }  # fmt: skip

    def _difference(self, reply: Any) -> Tensor:
        try:
            candidates = _Reply.model_validate(reply).choices[0].logprobs.content[0].top_logprobs
        except ValidationError as error:
            raise BadReplyError(f"no log-probabilities in {str(reply)[:200]!r}") from error
        logprobs = {candidate.token: candidate.logprob for candidate in candidates}
        missing = [text for text in (self.options.target, self.options.contrast) if text not in logprobs]
        if missing:
            got = visible(", ".join(map(repr, list(logprobs)[:8])))
            raise BadReplyError(f"{' and '.join(map(repr, missing))} not among the answer's tokens: {got}")
        return torch.tensor(logprobs[self.options.target] - logprobs[self.options.contrast], dtype=torch.float64)
