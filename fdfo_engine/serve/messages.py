"""Bodies of requests and answers: what the OpenAPI description is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from fdfo_engine.serve.queue import Operation, OperationState
from fdfo_engine.serve.rounds import MAX_PROMPTS, RoundKind, RoundState

MAX_PROMPT_CHARACTERS = 16_384
MAX_INTEGER = 2**53 - 1  # what every JSON reader keeps exact

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARACTERS, pattern=r"\S")]
RaterName = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[\w.@+-]+$")]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Request(BaseModel):
    """A request's body: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class Answer(BaseModel):
    """An answer's body."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Empty(Request):
    """No fields."""


# operations


class OperationBody(Answer):
    """Work that takes a while. Ask for it again until `state` is done or failed."""

    id: int
    kind: str
    state: OperationState
    seq: int | None = None
    """Of a primitive."""
    result: dict[str, Any] | None = None
    """What it gave, once it is done."""
    problem: dict[str, Any] | None = None
    """Why it failed, as `application/problem+json`."""
    created: float
    """Seconds since 1970."""
    finished: float | None = None

    @classmethod
    def of(cls, operation: Operation) -> OperationBody:
        """The answer about an operation of the queue."""
        return cls(
            id=operation.id, kind=operation.kind, state=operation.state, seq=operation.seq, result=operation.result,
            problem=operation.problem, created=operation.created, finished=operation.finished,
        )  # fmt: skip


# rounds


class Keep(Request):
    """Samples more pairs than the round shows."""

    of: Annotated[int, Field(ge=1, le=16)]
    """Pairs sampled for each one that is shown."""
    by: Literal["distance"] = "distance"
    """Of a prompt's pairs the ones whose latents ended furthest apart are shown."""


class Sampling(Request):
    """What to sample: prompts, or the next `count` of the run's own."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    """One pair a prompt."""
    count: Annotated[int, Field(ge=1, le=MAX_PROMPTS)] | None = None
    """The next prompts of the run's list; neither this nor prompts takes sampling.pairs_per_epoch."""
    copies: Annotated[int, Field(ge=1, le=64)] = 1
    """Pairs of each prompt."""
    keep: Keep | None = None

    @model_validator(mode="after")
    def _only_one(self) -> Sampling:
        if self.prompts is not None and self.count is not None:
            raise ValueError("takes prompts or count, not both")
        return self


class RoundBody(Answer):
    """A set of pairs that were sampled with one state of the weights, and train once."""

    id: str
    kind: RoundKind
    """training, or a comparison of the untrained model (branch 0) with the trained one, which never trains."""
    state: RoundState
    """open takes feedback; sealed and trained do not."""
    operation: int
    """That sampled it."""
    pairs: int
    """How many it shows."""
    sampled: int
    """How many were sampled."""
    first_pair: int
    epoch: int
    weights_version: int
    """Optimiser steps taken before it was sampled."""
    labelled: int
    """Pairs on which somebody has an opinion."""


class RoundsBody(Answer):
    """All rounds, oldest first."""

    rounds: list[RoundBody]


class PairBody(Answer):
    """A pair as a rater sees it; left and right are shuffled for each (pair, rater)."""

    pair_id: int
    prompt: str
    left: str
    """Id of an image: `/v1/images/{id}/content`."""
    right: str
    distance: float
    """How far apart the latents ended: rms of half their difference."""


class PairsBody(Answer):
    """Pairs of a round."""

    pairs: list[PairBody]


class Judgement(Request):
    """One opinion on one pair: a choice, or scores."""

    pair_id: Count
    choice: Literal["left", "right", "tie", "skip"] | None = None
    """Of the two images as they were shown to this rater; skip is no opinion."""
    scores: Annotated[dict[str, Number | None], Field(min_length=2, max_length=2)] | None = None
    """By image id; larger is better; null is no opinion on the pair."""
    ms: Annotated[int, Field(ge=0, le=86_400_000)] | None = None
    """How long the rater looked."""
    flips: Annotated[int, Field(ge=0, le=100_000)] | None = None
    zooms: Annotated[int, Field(ge=0, le=100_000)] | None = None
    swapped: bool = False
    """Whether left and right were shown the other way round, as for a repeated pair."""

    @model_validator(mode="after")
    def _only_one(self) -> Judgement:
        if (self.choice is None) == (self.scores is None):
            raise ValueError("takes choice or scores")
        return self


class Feedback(Request):
    """Opinions of one rater."""

    rater: RaterName = "anonymous"
    judgements: Annotated[list[Judgement], Field(min_length=1, max_length=MAX_PROMPTS)]


class FeedbackBody(Answer):
    """What was recorded; it is on disk."""

    events: list[int]
    """Ids, one a judgement: a DELETE takes one back."""


class OpinionBody(Answer):
    """One event of feedback."""

    event: int
    pair_id: int
    rater: str
    choice: Literal["left", "right", "tie", "skip"] | None = None
    """As it was shown; nothing where the opinion is scores."""
    rewards: list[float | None]
    """Of branch 0 and branch 1."""
    swapped: bool = False
    ms: int | None = None
    flips: int | None = None
    zooms: int | None = None
    withdrawn: bool
    """Whether it was taken back."""
    counts: bool
    """Whether it is the newest of its pair and rater."""
    time: float
    """Seconds since 1970."""


class OpinionsBody(Answer):
    """Feedback of a round, oldest first, with what was taken back or replaced."""

    opinions: list[OpinionBody]


class Comparison(Request):
    """Draws images of fixed prompts and seeds by the untrained and by the trained model, to be judged blindly."""

    count: Annotated[int, Field(ge=1, le=MAX_PROMPTS)] | None = None
    """Pairs; by default `labels.comparison`."""
    seed: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    """Of the noise; by default `evaluation.seed`."""


class Withdrawn(Answer):
    """What counts for the pair and rater now."""

    pair_id: int
    choice_of_event: int | None
    """The event that counts now, if there is one."""


class TrainRound(Request):
    """Trains on a round's feedback. Pairs without an opinion pull at nothing."""

    minimum: Annotated[int, Field(ge=1, le=MAX_PROMPTS)] = 1
    """Refused with fewer labelled pairs."""


# primitives


class Primitive(Request):
    """Primitives run in the order of `seq`."""

    seq: Annotated[int, Field(ge=1, le=MAX_INTEGER)]
    """1 for the first, then one more each; the same number with the same body gives the stored answer."""


class Sample(Primitive, Sampling):
    """Samples a round."""


class ComputeReward(Primitive):
    """Scores a round's images by the run's own rewards."""

    round: str


class Forward(Primitive):
    """The log-ratio of each item of a round, at the present weights."""

    round: str
    part: Annotated[int, Field(ge=0, le=1000)] = 0
    parts: Annotated[int, Field(ge=1, le=1000)] | None = None
    """By default `update.optimizer_steps`."""


PerBranch = Annotated[list[Number | None], Field(min_length=2, max_length=2)]


class LossConfig(Request):
    """Settings of a loss."""

    clip_range: Annotated[float, Field(gt=0, le=1e6)] | None = None


class ForwardBackward(Forward):
    """Adds the gradient of one part of a round. Takes one of rewards, advantages and weights."""

    loss_fn: Literal["fdfo", "weights"] = "fdfo"
    loss_config: LossConfig = LossConfig()
    rewards: dict[str, PerBranch] | None = None
    """By pair id, of the images `images[0]` and `images[1]` of that pair; null, or a pair left out, is no opinion."""
    advantages: dict[str, PerBranch] | None = None
    """As rewards, already signed for each branch."""
    weights: dict[str, Annotated[list[list[Number]], Field(min_length=2, max_length=2)]] | None = None
    """By pair id, for loss_fn weights: dL/dl of each item, in the order of `forward`'s answer."""
    more: bool = False
    """Whether this optimiser step takes further gradients."""
    allow_stale: bool = False

    @model_validator(mode="after")
    def _fits_the_loss(self) -> ForwardBackward:
        given = [name for name in ("rewards", "advantages", "weights") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("takes one of rewards, advantages, weights")
        if (given == ["weights"]) != (self.loss_fn == "weights"):
            raise ValueError("weights go with loss_fn weights, rewards and advantages with fdfo")
        return self


class OptimStep(Primitive):
    """Applies the gathered gradient."""

    lr: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Of this step; by default `optimizer.lr`."""


class Snapshot(Primitive):
    """Ends an epoch: the average of the weights moves, and a checkpoint is kept that images can be drawn from."""


class SaveState(Primitive):
    """Keeps a checkpoint of the last epoch's end."""


class LoadState(Primitive):
    """Goes back to a checkpoint."""

    name: Annotated[str, StringConstraints(pattern=r"^epoch_\d{6,12}$")]


# run


class RunBody(Answer):
    """The run."""

    state: Literal["idle", "running", "pausing"]
    """idle takes primitives and rounds; running trains by the run's own rewards; pausing ends what is in progress."""
    epoch: int
    epochs: int
    next_pair: int
    weights_version: int
    queued: int
    """Operations that wait."""
    phase: dict[str, Any] | None = None
    """What is being done: name, done, total, eta_s."""
    last_checkpoint: str | None = None
    error: str | None = None
    """Why the run stopped by itself."""


class Export(Request):
    """Writes the trained weights as other tools read them."""

    style: Literal["diffusers", "comfyui", "merged"] = "diffusers"
    weights: Literal["auto", "ema", "raw"] = "auto"


class ConfigBody(Answer):
    """The resolved settings."""

    settings: dict[str, Any]
    yaml: str


class MetricsBody(Answer):
    """Lines of metrics.jsonl and evaluations.jsonl."""

    epochs: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


class CheckpointsBody(Answer):
    """Whole checkpoints, oldest first."""

    checkpoints: list[str]


class EventsBody(Answer):
    """Lines of events.jsonl."""

    events: list[dict[str, Any]]
    last: int
    """Ask for what is after this one."""


class Session(Request):
    """The token, for a cookie: a page cannot set headers of its event stream."""

    token: Annotated[str, StringConstraints(min_length=1, max_length=200)]


class CapabilitiesBody(Answer):
    """What this server is."""

    engine: str
    """Version of fdfo_engine."""
    model: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    ranks: int
    parts: int
    """Optimiser steps that a round is cut into by default."""
    loss_fns: list[str]
    rewards: list[str]
    """The run's own."""
    expected_seq: int
    """The number that the next primitive bears."""
    max_prompts: int
    max_body_bytes: int


class Health(Answer):
    """Whether the server answers."""

    status: Literal["ok", "starting"]
