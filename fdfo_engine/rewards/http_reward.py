"""Scores from a server of your own, over HTTP: JSON both ways, images as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fdfo_engine.rewards.json_server import BadReplyError, JsonServer, ServerOptions
from fdfo_engine.rewards.model_options import micro_batches
from fdfo_engine.rewards.pixels import png_base64, to_bytes
from fdfo_engine.rewards.registry import register
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.runtime.errors import RewardError

_VERSION = 1
_FIRST_SIDE = 256  # pixels of the drawn picture that is asked about before a run


class HttpOptions(ServerOptions):
    """A server that speaks the protocol of `HttpReward`."""

    batch_size: int = Field(default=8, ge=1)
    """Images in one request."""


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Score(_Message):
    id: str
    score: float | None


class _Reply(_Message):
    scores: list[_Score]


class _Request(NamedTuple):
    ids: list[str]
    prompts: list[str]
    images: Tensor


@register("http")
class HttpReward(Reward):
    """Whatever the server at `url` says; range and unit are its own. `name: http://...` in a config is the same.

    Request (POST, `batch_size` images): `{"version": 1, "items": [{"id", "prompt", "image"}, ...]}`, the image a PNG
    file in base64. Reply: `{"scores": [{"id", "score"}, ...]}`, every id once, in any order; `"score": null` is no
    opinion. Before a run begins it is asked about a drawn picture; with `ask_first: false` about none, to which
    `{"scores": []}` is the answer. A reply that is not this costs its images their score; too few, too many or unknown
    ids stop the run.
    `examples/reward_server.py` is such a server.
    """

    Options: type[HttpOptions] = HttpOptions

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self._server = JsonServer(options)

    def require_ready(self) -> None:
        """Asks for one score, or for none where `ask_first` is false.

        Raises:
            RewardError: no such server, or it does not speak the protocol.
        """
        if self.options.ask_first:
            prompt, images = self.self_test_case(_FIRST_SIDE)
            request = _Request(["0"], [prompt], to_bytes(images[:1]))
            self._server.ask_first("", _message(request), lambda reply: self._read(reply, request))
            return
        reply = self._server.require_ready("POST", "", _message(_Request([], [], torch.empty(0))))
        try:
            _validated(reply)
        except BadReplyError as error:
            raise RewardError(f'{self.options.url}: no items were not answered by {{"scores": []}}') from error

    def cancel(self) -> None:
        """Ends all waiting for the server."""
        self._server.cancel()

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Scores `[N]` of images `[N, 3, H, W]`; NaN where the server has no opinion or no good reply."""
        most = self.options.batch_size
        requests = [
            _Request([str(number * most + row) for row in range(len(texts))], texts, pixels)
            for number, (texts, pixels) in enumerate(micro_batches(prompts, to_bytes(images), most))
        ]
        sizes = [len(request.ids) for request in requests]
        answers = self._server.opinions(self._scores, requests, sizes)
        scores: list[float] = []
        for answer, size in zip(answers, sizes, strict=True):
            scores += [torch.nan] * size if isinstance(answer, BadReplyError) else answer
        return torch.tensor(scores)

    def _scores(self, request: _Request) -> list[float]:
        return self._read(self._server.ask("", _message(request)), request)

    def _read(self, reply: Any, request: _Request) -> list[float]:
        return _in_order(_validated(reply), request.ids, self.options.url)


def _message(request: _Request) -> dict[str, Any]:
    rows = zip(request.ids, request.prompts, request.images, strict=True)
    items = [{"id": id_, "prompt": prompt, "image": png_base64(image)} for id_, prompt, image in rows]
    return {"version": _VERSION, "items": items}


def _validated(reply: Any) -> _Reply:
    try:
        return _Reply.model_validate(reply)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = f"reply {place}: {first['msg']}: {str(reply)[:200]!r}"
        raise BadReplyError("not of the protocol", what) from error


def _in_order(reply: _Reply, ids: list[str], url: str) -> list[float]:
    scores = {score.id: score.score for score in reply.scores}
    if len(reply.scores) != len(ids):
        raise RewardError(f"{url} returned {len(reply.scores)} scores for {len(ids)} images")
    if scores.keys() != set(ids):
        raise RewardError(f"{url} returned scores for ids {sorted(scores)[:8]}, asked for {ids[:8]}")
    return [torch.nan if (score := scores[id_]) is None else score for id_ in ids]
