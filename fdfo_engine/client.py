"""A client of `fdfo serve` in one file: copy it where you like. Needs httpx and httpx-sse, nothing of fdfo_engine.

    with Client.of_run("runs/shapes") as client:
        for _ in range(10):
            sampled = client.sample(count=96)
            pairs = sampled["pairs"]
            scores = {p["pair_id"]: [score(client.image(i), p["prompt"]) for i in p["images"]] for p in pairs}
            for part in range(client.capabilities()["parts"]):
                client.forward_backward(sampled["round"], rewards=scores, part=part)
                client.optim_step()
            client.snapshot()

`AsyncClient` has the same methods, each to be awaited. Every request that creates something bears an Idempotency-Key,
and is sent again with the same one when the server does not answer, answers 408, 429 or 5xx, or restarts.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import aconnect_sse, connect_sse

RETRIED = (408, 429, 500, 502, 503, 504)
WAIT_S = 30.0
Json = dict[str, Any]


class ServerError(Exception):
    """What the server refused: `status`, `code`, `detail`, `fix` and the whole `problem`."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status, self.problem = status, dict(problem)
        self.code, self.detail, self.fix = (problem.get(name) for name in ("code", "detail", "fix"))
        hint = f"; {self.fix}" if self.fix else ""
        super().__init__(f"{status} {self.code}: {self.detail}{hint}")


@dataclass
class _Request:
    """One request; what repeats it is the same to the letter."""

    method: str
    path: str
    body: Json | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


_Steps = Generator[_Request, httpx.Response, Any]


def _verb(steps: Callable[..., _Steps]) -> Any:
    """A method written once: it yields requests and is sent responses, at once or awaited."""

    @functools.wraps(steps)
    def method(self: _Verbs, *args: Any, **named: Any) -> Any:
        return self._run(steps(self, *args, **named))

    return method


class _Verbs:
    """What both clients can do."""

    def __init__(self, url: str, token: str, *, patience_s: float = 120.0) -> None:
        """`patience_s` is how long a server that does not answer is asked again."""
        self.url = url.rstrip("/")
        self.patience_s = patience_s
        self._headers = {"Authorization": f"Bearer {token}"}
        self._seq: int | None = None

    @classmethod
    def of_run(cls, folder: str | Path, **options: Any) -> Any:
        """The client of the server that serves this run folder: reads its address and token there."""
        address = json.loads((Path(folder) / "serve.json").read_text())
        return cls(address["url"], (Path(folder) / "serve.token").read_text().strip(), **options)

    # about

    @_verb
    def capabilities(self) -> _Steps:
        """What the server is: model, size, steps, ranks, parts, rewards."""
        return (yield from self._get("/v1/capabilities"))

    @_verb
    def ready(self) -> _Steps:
        """Returns once the engine is loaded."""
        return (yield from self._get("/readyz"))

    # the run

    @_verb
    def run(self) -> _Steps:
        """Where the run is."""
        return (yield from self._get("/v1/run"))

    @_verb
    def start(self) -> _Steps:
        """Lets the run train by its own rewards."""
        return (yield from self._post("/v1/run/start", {}))

    @_verb
    def pause(self) -> _Steps:
        """Ends that after the epoch in progress."""
        return (yield from self._post("/v1/run/pause", {}))

    @_verb
    def stop(self) -> _Steps:
        """Ends what is in progress now."""
        return (yield from self._post("/v1/run/stop", {}))

    @_verb
    def metrics(self) -> _Steps:
        """Lines of metrics.jsonl and evaluations.jsonl."""
        return (yield from self._get("/v1/run/metrics"))

    @_verb
    def checkpoints(self) -> _Steps:
        """Names of the checkpoints, oldest first."""
        return (yield from self._get("/v1/run/checkpoints"))["checkpoints"]

    @_verb
    def checkpoint(self) -> _Steps:
        """Keeps a checkpoint."""
        return (yield from self._operation("/v1/run/checkpoint", {}))

    @_verb
    def export(self, style: str = "diffusers", weights: str = "auto") -> _Steps:
        """Writes the trained weights beside the run: `{operation, folder, files}`."""
        return (yield from self._operation("/v1/run/export", {"style": style, "weights": weights}))

    @_verb
    def exported(self, export: Json, file: str) -> _Steps:
        """A file of what `export` wrote, as bytes."""
        return (yield _Request("GET", f"/v1/run/exports/{export['operation']}/{file}")).content

    @_verb
    def report(self) -> _Steps:
        """The run's report, an HTML page, as bytes."""
        return (yield _Request("GET", "/v1/run/report.html")).content

    # rounds

    @_verb
    def create_round(self, prompts: Sequence[str] | None = None, *, count: int | None = None, **options: Any) -> _Steps:
        """Samples a round to be judged: `{round, pairs, ...}`. Takes copies and keep."""
        return (yield from self._operation("/v1/rounds", _given(prompts=prompts, count=count, **options)))

    @_verb
    def compare(self, *, count: int | None = None, seed: int | None = None) -> _Steps:
        """Draws pairs of the untrained and the trained model: `{round, pairs, ...}`, a round that never trains."""
        return (yield from self._operation("/v1/comparisons", _given(count=count, seed=seed)))

    @_verb
    def rounds(self) -> _Steps:
        """All rounds, oldest first."""
        return (yield from self._get("/v1/rounds"))["rounds"]

    @_verb
    def round(self, name: str) -> _Steps:
        """One round."""
        return (yield from self._get(f"/v1/rounds/{name}"))

    @_verb
    def pairs(self, name: str, *, rater: str = "anonymous", unlabelled: bool = False) -> _Steps:
        """Its pairs as `rater` sees them, or those on which that rater has no opinion yet."""
        query = {"unlabelled_by" if unlabelled else "rater": rater}
        return (yield from self._get(f"/v1/rounds/{name}/pairs", query))["pairs"]

    @_verb
    def feedback(self, name: str, judgements: Sequence[Json], *, rater: str = "anonymous") -> _Steps:
        """Records `{pair_id, choice}` or `{pair_id, scores: {image id: number}}`; returns ids of the events."""
        body = {"rater": rater, "judgements": list(judgements)}
        return (yield from self._post(f"/v1/rounds/{name}/feedback", body))["events"]

    @_verb
    def opinions(self, name: str, *, rater: str | None = None) -> _Steps:
        """Every event of feedback of a round, oldest first, with what was replaced or taken back."""
        return (yield from self._get(f"/v1/rounds/{name}/feedback", _given(rater=rater)))["opinions"]

    @_verb
    def withdraw(self, name: str, event: int) -> _Steps:
        """Takes one opinion back."""
        response = yield _Request("DELETE", f"/v1/rounds/{name}/feedback/{event}")
        return response.json()

    @_verb
    def train(self, name: str, *, minimum: int = 1) -> _Steps:
        """Trains on a round's feedback."""
        return (yield from self._operation(f"/v1/rounds/{name}/train", {"minimum": minimum}))

    # primitives

    @_verb
    def sample(self, prompts: Sequence[str] | None = None, *, count: int | None = None, **options: Any) -> _Steps:
        """Samples a round: `{round, pairs: [{pair_id, prompt, images, distance}], ...}`. Takes copies and keep."""
        return (yield from self._primitive("sample", _given(prompts=prompts, count=count, **options)))

    @_verb
    def compute_reward(self, name: str) -> _Steps:
        """The run's own rewards of a round: `{rewards: {pair id: [r0, r1]}, parts}`."""
        return (yield from self._primitive("compute_reward", {"round": name}))

    @_verb
    def forward(self, name: str, *, part: int = 0, parts: int | None = None) -> _Steps:
        """The log-ratio of each item: `{log_ratios: {pair id: [branch][step]}, steps}`."""
        return (yield from self._primitive("forward", _given(round=name, part=part, parts=parts)))

    @_verb
    def forward_backward(self, name: str, **options: Any) -> _Steps:
        """Adds a gradient. Takes one of rewards, advantages and weights by pair id; part, parts, more, loss_config."""
        body = {"round": name} | {k: _by_text(v) if k in _TABLES else v for k, v in options.items() if v is not None}
        if "weights" in body:
            body.setdefault("loss_fn", "weights")
        return (yield from self._primitive("forward_backward", body))

    @_verb
    def optim_step(self, lr: float | None = None) -> _Steps:
        """Applies the gradient: `{grad_norm, applied, left_out}`."""
        return (yield from self._primitive("optim_step", _given(lr=lr)))

    @_verb
    def snapshot(self) -> _Steps:
        """Ends an epoch and keeps its checkpoint."""
        return (yield from self._primitive("snapshot", {}))

    @_verb
    def save_state(self) -> _Steps:
        """Keeps a checkpoint of the last epoch's end."""
        return (yield from self._primitive("save_state", {}))

    @_verb
    def load_state(self, name: str) -> _Steps:
        """Goes back to the weights of a checkpoint."""
        return (yield from self._primitive("load_state", {"name": name}))

    # images

    @_verb
    def image(self, image: str) -> _Steps:
        """The PNG of an image, as bytes."""
        return (yield _Request("GET", f"/v1/images/{image}/content")).content

    @_verb
    def generate(self, prompt: str, *, model: str = "run", n: int = 1, seed: int = 0, **options: Any) -> _Steps:
        """PNGs that `model` (`base`, `run`, `run@epoch_000040`) draws, as bytes."""
        body = {"prompt": prompt, "model": model, "n": n, "seed": seed, **options}
        answer = yield from self._post("/v1/images/generations", body)
        return [base64.b64decode(item["b64_json"]) for item in answer["data"]]

    # parts

    def _run(self, steps: _Steps) -> Any:
        raise NotImplementedError

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> _Steps:
        return (yield _Request("GET", path, query=query or {})).json()

    def _post(self, path: str, body: Json, query: Mapping[str, Any] | None = None) -> _Steps:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return (yield _Request("POST", path, body, query or {}, headers)).json()

    def _operation(self, path: str, body: Json, query: Mapping[str, Any] | None = None) -> _Steps:
        operation = yield from self._post(path, body, query)
        while operation["state"] not in ("done", "failed"):
            operation = yield from self._get(f"/v1/operations/{operation['id']}", {"wait": WAIT_S})
        if operation["state"] == "failed":
            raise ServerError(operation["problem"]["status"], operation["problem"])
        return operation["result"]

    def _primitive(self, kind: str, body: Json) -> _Steps:
        if self._seq is None:
            self._seq = (yield from self._get("/v1/capabilities"))["expected_seq"]
        seq, self._seq = self._seq, self._seq + 1
        try:
            return (yield from self._operation(f"/v1/{kind}", {"seq": seq, **body}, {"wait": WAIT_S}))
        except ServerError:
            self._seq = None  # what was refused took no number: ask for the next one
            raise


_TABLES = ("rewards", "advantages", "weights")


def _given(**values: Any) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _by_text(table: Mapping[Any, Any]) -> Json:
    """JSON's names are text."""
    return {str(pair): value for pair, value in table.items()}


@dataclass
class _Patience:
    """When to ask again: growing pauses with jitter, or what the server says; not for ever."""

    until: float
    pause_s: float = 0.25

    def delay(self, response: httpx.Response | None) -> float | None:
        """Seconds to wait; None where it is enough."""
        if time.monotonic() > self.until:
            return None
        told = response.headers.get("retry-after", "") if response is not None else ""
        pause, self.pause_s = self.pause_s, min(8.0, 2 * self.pause_s)
        return float(told) if told.isdecimal() else pause * random.uniform(0.5, 1.0)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = {"code": "http", "detail": response.text[:200]}
    if "error" in problem:  # OpenAI's shape
        problem = {"code": problem["error"].get("code"), "detail": problem["error"].get("message")}
    raise ServerError(response.status_code, problem)


class Client(_Verbs):
    """Asks and waits."""

    def __init__(self, url: str, token: str, *, patience_s: float = 120.0, transport: Any = None) -> None:
        super().__init__(url, token, patience_s=patience_s)
        self._http = httpx.Client(base_url=self.url, headers=self._headers, timeout=WAIT_S + 30, transport=transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends its connections."""
        self._http.close()

    def events(self, after: int = 0) -> Iterator[Json]:
        """Every event behind number `after`, for ever; goes on across restarts of the server."""
        patience = _Patience(time.monotonic() + self.patience_s)
        while True:
            try:
                headers = {"Last-Event-ID": str(after)}
                with connect_sse(self._http, "GET", "/v1/events", headers=headers, timeout=60.0) as source:
                    _checked(source.response)
                    for message in source.iter_sse():
                        if message.data:
                            after = int(message.id)
                            patience = _Patience(time.monotonic() + self.patience_s)
                            yield json.loads(message.data)
            except httpx.TransportError:
                delay = patience.delay(None)
                if delay is None:
                    raise
                time.sleep(delay)

    def _run(self, steps: _Steps) -> Any:
        request = next(steps)
        while True:
            try:
                response = self._answered(request)
            except ServerError as error:
                step = functools.partial(steps.throw, error)
            else:
                step = functools.partial(steps.send, response)
            try:
                request = step()
            except StopIteration as end:
                return end.value

    def _answered(self, request: _Request) -> httpx.Response:
        patience = _Patience(time.monotonic() + self.patience_s)
        while True:
            response, failure = None, None
            try:
                response = self._http.request(
                    request.method, request.path, json=request.body, params=request.query, headers=request.headers
                )
            except httpx.TransportError as error:
                failure = error
            if response is not None and response.status_code not in RETRIED:
                return _checked(response)
            delay = patience.delay(response)
            if delay is None:
                raise failure or ServerError(response.status_code, {"code": "http"})  # type: ignore[union-attr]
            time.sleep(delay)


class AsyncClient(_Verbs):
    """The same verbs, awaited."""

    def __init__(self, url: str, token: str, *, patience_s: float = 120.0, transport: Any = None) -> None:
        super().__init__(url, token, patience_s=patience_s)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=WAIT_S + 30, transport=transport
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends its connections."""
        await self._http.aclose()

    async def events(self, after: int = 0) -> AsyncIterator[Json]:
        """As `Client.events`."""
        patience = _Patience(time.monotonic() + self.patience_s)
        while True:
            try:
                headers = {"Last-Event-ID": str(after)}
                async with aconnect_sse(self._http, "GET", "/v1/events", headers=headers, timeout=60.0) as source:
                    _checked(source.response)
                    async for message in source.aiter_sse():
                        if message.data:
                            after = int(message.id)
                            patience = _Patience(time.monotonic() + self.patience_s)
                            yield json.loads(message.data)
            except httpx.TransportError:
                delay = patience.delay(None)
                if delay is None:
                    raise
                await asyncio.sleep(delay)

    async def _run(self, steps: _Steps) -> Any:
        request = next(steps)
        while True:
            try:
                response = await self._answered(request)
            except ServerError as error:
                step = functools.partial(steps.throw, error)
            else:
                step = functools.partial(steps.send, response)
            try:
                request = step()
            except StopIteration as end:
                return end.value

    async def _answered(self, request: _Request) -> httpx.Response:
        patience = _Patience(time.monotonic() + self.patience_s)
        while True:
            response, failure = None, None
            try:
                response = await self._http.request(
                    request.method, request.path, json=request.body, params=request.query, headers=request.headers
                )
            except httpx.TransportError as error:
                failure = error
            if response is not None and response.status_code not in RETRIED:
                return _checked(response)
            delay = patience.delay(response)
            if delay is None:
                raise failure or ServerError(response.status_code, {"code": "http"})  # type: ignore[union-attr]
            await asyncio.sleep(delay)
