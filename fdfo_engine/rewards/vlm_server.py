"""The VLM reward from a server with OpenAI's chat API (vLLM, SGLang): from the top log-probabilities of its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fdfo_engine.rewards.first_token import Candidate, Leaning, LittleMassError, leaning
from fdfo_engine.rewards.json_server import BadReplyError, JsonServer, ServerOptions
from fdfo_engine.rewards.pixels import png_base64
from fdfo_engine.rewards.questions import AnswerMass, QuestionOptions, asked, score_of, seen
from fdfo_engine.rewards.registry import register
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.runtime.console import visible
from fdfo_engine.runtime.errors import RewardError

_CHAT = "/chat/completions"
_FIRST_SIDE = 256  # pixels of the drawn picture that is asked about before a run
_SHOWN_CHARACTERS = 60


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
    token: Any = None
    logprob: Any = None
    bytes: Any = None


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
    are the server's. What counts as an answer, and when there is no opinion, says `first_token.leaning`. The answers'
    probability is logged as `answer_mass`. vLLM's `--api-key` guards its API paths only: bind it to the loopback. The
    key comes from env FDFO_REWARD_KEY. Weights: Qwen2.5-VL-7B-Instruct (Apache-2.0) by default.
    """

    Options: type[VlmServerOptions] = VlmServerOptions

    def __init__(self, options: VlmServerOptions) -> None:
        self.options = options
        self._server = JsonServer(options)
        self._mass = AnswerMass()

    def require_ready(self) -> None:
        """Asks for the list of models; then, unless `ask_first` is false, the question about one drawn picture.

        Raises:
            RewardError: no such server, it has no such model, or its answer has no score.
        """
        self._require_model()
        if self.options.ask_first:
            prompt, images = self.self_test_case(_FIRST_SIDE)
            message = self._message(*self._questions([prompt], images[:1])[0])
            self._server.ask_first(_CHAT, message, self._leaning)

    def _require_model(self) -> None:
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

    def take_notes(self) -> dict[str, Tensor]:
        """`answer_mass`: the probability of both answers together, NaN where the reply had none."""
        return self._mass.take()

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Scores `[N]` of images `[N, 3, H, W]`; NaN where the server's answer tells nothing."""
        questions = self._questions(prompts, images)
        answers = self._server.opinions(self._ask, questions, [1] * len(questions))
        self._mass.keep(torch.tensor([_mass(answer) for answer in answers]))
        differences = [answer.difference if isinstance(answer, Leaning) else torch.nan for answer in answers]
        return score_of(torch.tensor(differences, dtype=torch.float64))

    def _questions(self, prompts: Sequence[str], images: Tensor) -> list[tuple[str, Tensor]]:
        texts = [asked(self.options.question, prompt) for prompt in prompts]
        return list(zip(texts, seen(images, self.options.image_size), strict=True))

    def _ask(self, question: tuple[str, Tensor]) -> Leaning:
        return self._leaning(self._server.ask(_CHAT, self._message(*question)))

    def _message(self, question: str, image: Tensor) -> dict[str, Any]:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64(image)}"}}
        return {
            "model": self.options.model,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
            "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": self.options.top_logprobs,
            **self.options.extra,
        }  # fmt: skip

    def _leaning(self, reply: Any) -> Leaning:
        try:
            top = _Reply.model_validate(reply).choices[0].logprobs.content[0].top_logprobs
        except ValidationError as error:
            raise BadReplyError(f"no log-probabilities: {_place_and_value(error)}") from error
        return leaning([Candidate(one.token, one.logprob, one.bytes) for one in top], self.options)


def _mass(answer: Leaning | BadReplyError) -> float:
    return answer.mass if isinstance(answer, Leaning | LittleMassError) else torch.nan


def _place_and_value(error: ValidationError) -> str:
    """What is there, or beside it, instead of what the reply should have; without what differs between replies."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the reply"
    value = first["input"]
    if first["type"] == "missing":
        return f"{place} is missing beside {', '.join(sorted(map(str, value))) or 'nothing'}"
    return f"{place} is {visible(json.dumps(value)[:_SHOWN_CHARACTERS])}"
