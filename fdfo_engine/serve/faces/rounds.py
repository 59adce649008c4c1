"""Rounds: pairs for people and reward services, their feedback, and training on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from fdfo_engine.serve.backend import Backend
from fdfo_engine.serve.endpoints import Call, Endpoint, answer
from fdfo_engine.serve.messages import (
    Comparison,
    Feedback,
    FeedbackBody,
    Judgement,
    OperationBody,
    OpinionBody,
    OpinionsBody,
    PairBody,
    PairsBody,
    RaterName,
    RoundBody,
    RoundsBody,
    Sampling,
    TrainRound,
    Withdrawn,
)
from fdfo_engine.serve.problems import FieldProblem, Problem
from fdfo_engine.serve.rounds import COMPARISON_OPERATION, StoredPair

_REWARDS = {"left": (1.0, 0.0), "right": (0.0, 1.0), "tie": (0.5, 0.5), "skip": (None, None)}


class PairsQuery(BaseModel):
    """Which pairs, and as whom they are shown."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rater: RaterName = "anonymous"
    """Left and right are shuffled for each rater."""
    unlabelled_by: RaterName | None = None
    """Only pairs on which this rater has no opinion; they are shown to that rater."""


class FeedbackQuery(BaseModel):
    """Whose."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rater: RaterName | None = None
    """Only what this rater said."""


async def create(call: Call) -> Response:
    """Samples a round; the operation's result names it."""
    body = call.body.model_dump(exclude_none=True)
    if call.backend.wish == "running":
        raise Problem(409, "running", "the run trains by itself", fix="POST /v1/run/pause, and wait until it is idle")
    operation = await run_in_threadpool(call.backend.submit, "sample", body, key=call.key)
    return answer(OperationBody.of(operation), 202)


async def compare(call: Call) -> Response:
    """Draws pairs of the untrained and the trained model; the operation's result names the round they make."""
    if call.backend.status["weights_version"] == 0:
        raise Problem(409, "untrained", "nothing was trained yet: both models are the same")
    labels, evaluation = call.backend.config.labels, call.backend.config.evaluation
    body = {
        "count": labels.comparison if call.body.count is None else call.body.count,
        "seed": evaluation.seed if call.body.seed is None else call.body.seed,
    }
    operation = await run_in_threadpool(call.backend.submit, COMPARISON_OPERATION, body, key=call.key)
    return answer(OperationBody.of(operation), 202)


async def read_all(call: Call) -> Response:
    """All rounds."""
    backend = call.backend

    def rounds() -> list[RoundBody]:
        return [_round(backend, row["id"]) for row in backend.rounds.rounds()]

    return answer(RoundsBody(rounds=await run_in_threadpool(rounds)))


async def read(call: Call) -> Response:
    """One round."""
    return answer(await run_in_threadpool(_round, call.backend, call.path("round")))


def _round(backend: Backend, name: str) -> RoundBody:
    row = backend.round(name)
    return RoundBody(
        id=name,
        kind=row["kind"],
        state=row["state"],
        operation=row["operation"],
        pairs=len(backend.rounds.pairs(name)),
        sampled=row["sampled"],
        first_pair=row["first_pair"],
        epoch=row["epoch"],
        weights_version=row["weights_version"],
        labelled=len(backend.rewards_of(name)),
    )


async def pairs(call: Call) -> Response:
    """The pairs of a round as a rater sees them."""
    return answer(await run_in_threadpool(_pairs, call.backend, call.path("round"), call.query))


def _pairs(backend: Backend, name: str, query: PairsQuery) -> PairsBody:
    backend.round(name)
    rater = query.unlabelled_by or query.rater
    done = {opinion.pair for opinion in backend.rounds.opinions(name) if opinion.rater == query.unlabelled_by}
    return PairsBody(
        pairs=[_shown(backend, pair, rater) for pair in backend.rounds.pairs(name) if pair.pair not in done]
    )


def _shown(backend: Backend, pair: StoredPair, rater: str) -> PairBody:
    left, right = backend.shown(pair, rater)
    images = pair.images
    return PairBody(
        pair_id=pair.pair, prompt=pair.prompt, left=images[left], right=images[right], distance=pair.distance
    )  # fmt: skip


async def read_feedback(call: Call) -> Response:
    """What was said of a round's pairs."""
    return answer(await run_in_threadpool(_feedback, call.backend, call.path("round"), call.query.rater))


def _feedback(backend: Backend, name: str, rater: str | None) -> OpinionsBody:
    backend.round(name)
    counting = {opinion.event for opinion in backend.rounds.opinions(name)}
    return OpinionsBody(
        opinions=[
            OpinionBody(
                event=opinion.event, pair_id=opinion.pair, rater=opinion.rater, rewards=list(opinion.rewards),
                withdrawn=opinion.is_withdrawn, counts=opinion.event in counting, time=opinion.time, **opinion.details,
            )
            for opinion in backend.rounds.events(name)
            if rater in (None, opinion.rater)
        ]
    )  # fmt: skip


async def give_feedback(call: Call) -> Response:
    """Records opinions; they are on disk when this answers."""
    events = await run_in_threadpool(_record, call.backend, call.path("round"), call.body, call.key)
    call.backend.bell.ring()
    return answer(FeedbackBody(events=events), 201)


def _record(backend: Backend, name: str, feedback: Feedback, key: str | None) -> list[int]:
    backend.round(name)
    known = {pair.pair: pair for pair in backend.rounds.pairs(name)}
    wrong, opinions = [], []
    for i, judgement in enumerate(feedback.judgements):
        pair = known.get(judgement.pair_id)
        if pair is None:
            detail = f"round {name} has no pair {judgement.pair_id}"
            wrong.append(FieldProblem(pointer=f"/judgements/{i}/pair_id", detail=detail))
        elif judgement.scores is not None and judgement.scores.keys() != set(pair.images):
            detail = "takes a score for each of the pair's two image ids"
            wrong.append(FieldProblem(pointer=f"/judgements/{i}/scores", detail=detail))
        else:
            opinions.append(_opinion(backend, pair, feedback.rater, judgement))
    if wrong:
        raise Problem(422, "invalid", wrong[0].detail, errors=wrong)
    _refuse_mixture(backend, name, opinions)
    before = backend.rounds.last_feedback
    events = backend.rounds.add_feedback(name, opinions, key=key)
    if events and events[-1] > before:  # a repeated request is not told twice
        for opinion in opinions:
            backend.tell_feedback(name, opinion["pair"], opinion["rater"], opinion["rewards"])
    return events


def _opinion(backend: Backend, pair: StoredPair, rater: str, judgement: Judgement) -> dict[str, Any]:
    details = judgement.model_dump(include={"choice", "ms", "flips", "zooms", "swapped"}, exclude_none=True)
    return {
        "pair": pair.pair,
        "rater": rater,
        "kind": "choice" if judgement.choice is not None else "scores",
        "rewards": _rewards(backend, pair, rater, judgement),
        "details": details,
    }


def _rewards(backend: Backend, pair: StoredPair, rater: str, judgement: Judgement) -> tuple[float | None, float | None]:
    """Of branch 0 and branch 1."""
    if judgement.scores is not None:
        return judgement.scores[pair.images[0]], judgement.scores[pair.images[1]]
    assert judgement.choice is not None
    by_place = _REWARDS[judgement.choice]
    places = backend.shown(pair, rater)
    if judgement.swapped:
        places = places[::-1]
    return by_place[places.index(0)], by_place[places.index(1)]


def _refuse_mixture(backend: Backend, name: str, opinions: list[dict[str, Any]]) -> None:
    """A choice says 1 or 0; the mean of that and a score on another scale would say nothing."""
    kinds = {opinion.kind for opinion in backend.rounds.opinions(name)} | {opinion["kind"] for opinion in opinions}
    if len(kinds) > 1:
        raise Problem(409, "mixed_feedback", f"round {name}: choices and scores do not mix in one round")


async def take_back(call: Call) -> Response:
    """Undoes one opinion, until the round is sealed."""
    event = call.number("event")
    await run_in_threadpool(call.backend.round, call.path("round"))
    pair, left = await run_in_threadpool(call.backend.rounds.withdraw, call.path("round"), event)
    return answer(Withdrawn(pair_id=pair, choice_of_event=left))


async def train(call: Call) -> Response:
    """Seals the round and trains on it."""
    operation = await run_in_threadpool(_train, call.backend, call.path("round"), call.body, call.key)
    return answer(OperationBody.of(operation), 202)


def _train(backend: Backend, name: str, body: TrainRound, key: str | None) -> Any:
    request: Mapping[str, Any] = {"round": name}
    if key is not None and (known := backend.queue.with_key(key, "train", request)) is not None:
        return known
    row = backend.round(name)
    if row["kind"] == "comparison":
        raise Problem(409, "comparison", f"round {name} compares two models: nothing trains on it")
    if row["state"] == "trained":
        raise Problem(409, "round_trained", f"round {name} was trained on already")
    if backend.wish == "running":
        raise Problem(409, "running", "the run trains by itself", fix="POST /v1/run/pause, and wait until it is idle")
    labelled = len(backend.rewards_of(name))
    if labelled < body.minimum:
        raise Problem(409, "too_few_labels", f"round {name}: {labelled} labelled pairs, and {body.minimum} are wanted")
    backend.rounds.seal(name)
    return backend.submit("train", request, key=key)


ENDPOINTS = (
    Endpoint(
        "POST", "/v1/rounds", "Samples pairs to be judged.", create, {202: OperationBody}, body=Sampling, creates=True,
        problems=(409, 422, 429),
    ),
    Endpoint("GET", "/v1/rounds", "All rounds.", read_all, {200: RoundsBody}),
    Endpoint(
        "POST", "/v1/comparisons", "Draws pairs of the untrained and the trained model, to be judged blindly.", compare,
        {202: OperationBody}, body=Comparison, creates=True, problems=(409, 422, 429),
    ),
    Endpoint("GET", "/v1/rounds/{round}", "One round.", read, {200: RoundBody}, problems=(404,)),
    Endpoint(
        "GET", "/v1/rounds/{round}/pairs", "Its pairs, as a rater sees them.", pairs, {200: PairsBody},
        query=PairsQuery, problems=(404,),
    ),
    Endpoint(
        "GET", "/v1/rounds/{round}/feedback", "What was said of its pairs.", read_feedback, {200: OpinionsBody},
        query=FeedbackQuery, problems=(404,),
    ),
    Endpoint(
        "POST", "/v1/rounds/{round}/feedback", "Records opinions.", give_feedback, {201: FeedbackBody}, body=Feedback,
        creates=True, problems=(404, 409, 422, 507),
    ),
    Endpoint(
        "DELETE", "/v1/rounds/{round}/feedback/{event}", "Takes one opinion back.", take_back, {200: Withdrawn},
        problems=(404, 409),
    ),
    Endpoint(
        "POST", "/v1/rounds/{round}/train", "Seals the round and trains on its feedback.", train, {202: OperationBody},
        body=TrainRound, creates=True, problems=(404, 409, 422, 429),
    ),
)  # fmt: skip
