"""What one rater sees and does: the pairs that wait, answers, undo, and what the answers so far say."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fdfo_engine.choices import Choice, agreement, compared, hints_to_stop, summary
from fdfo_engine.label.access import Session
from fdfo_engine.label.conductor import Conductor
from fdfo_engine.label.link import EngineLink, Json
from fdfo_engine.label.messages import Label, Undo
from fdfo_engine.label.schedule import due, showings
from fdfo_engine.serve.problems import Problem


class Desk:
    """Answers the page's questions out of the server's rounds; holds nothing that a restart would lose."""

    def __init__(self, link: EngineLink, conductor: Conductor) -> None:
        self._link, self._conductor = link, conductor
        self._closed: dict[str, list[Choice]] = {}

    async def round(self, session: Session) -> Json:
        """The pairs of the current round that `session` has not answered, in order, and the answers that stand.

        Raises:
            Problem: the engine is away.
        """
        row = self._conductor.current
        if row is None or row["state"] != "open":
            return {"round": None, "due": [], "answers": []}
        name = str(row["id"])
        pairs = (await self._link.get(f"/v1/rounds/{name}/pairs", {"rater": session.rater}))["pairs"]
        own = [choice for choice in await self._choices(row) if choice.rater == session.rater]
        by_id = {pair["pair_id"]: pair for pair in pairs}
        shown = showings(list(by_id), self._repeats(row), session.rater)
        return {
            "round": name,
            "due": [_showing(by_id[d.showing.pair], d.showing.is_repeat, d.attempt) for d in due(shown, own)],
            "answers": [_answer(choice) for choice in own if not choice.is_withdrawn],
        }

    async def label(self, session: Session, label: Label) -> Json:
        """Records an answer: on disk when this returns. A second one to the same showing changes nothing.

        Raises:
            Problem: the round is over (409), the pair is none of it (404), the storage is full (507), or as `round`.
        """
        judgement = label.model_dump(exclude={"round", "attempt", "repeat"}, exclude_none=True)
        body = {"rater": session.rater, "judgements": [judgement | {"swapped": label.repeat}]}
        key = f"label-{label.round}-{session.rater}-{label.pair_id}-{int(label.repeat)}-{label.attempt}"
        try:
            (event,) = (await self._link.post(f"/v1/rounds/{label.round}/feedback", body, key))["events"]
        except Problem as problem:
            if problem.body.code == "invalid":
                raise Problem(404, "no_pair", f"round {label.round} has no pair {label.pair_id}") from problem
            if problem.body.code != "key_reused":
                raise
            event = await self._event_of(session, label)
        return {"event": event}

    async def _event_of(self, session: Session, label: Label) -> int:
        """The answer that this showing already has."""
        for told in reversed(await self._opinions(label.round, session.rater)):
            if told["pair_id"] == label.pair_id and bool(told.get("swapped")) == label.repeat:
                return int(told["event"])
        raise Problem(409, "answered", "this pair was answered in another window; reload the page")

    async def undo(self, session: Session, undo: Undo) -> Json:
        """Takes an answer of this rater back, until the round is sealed.

        Raises:
            Problem: it is not this rater's (404), the round is sealed (409), or as `round`.
        """
        own = await self._opinions(undo.round, session.rater)
        if undo.event not in {told["event"] for told in own}:
            raise Problem(404, "no_answer", "you gave no such answer")
        return await self._link.delete(f"/v1/rounds/{undo.round}/feedback/{undo.event}")

    async def state(self, session: Session) -> Json:
        """Everything on the page but the pairs."""
        conductor = self._conductor
        row, labels = conductor.current, conductor.labels
        answer: Json = {
            "question": "" if labels is None else labels.question,
            "tie": "" if labels is None else labels.tie,
            "rater": session.rater,
            "is_owner": session.is_owner,
            "activity": conductor.activity,
            "phase": conductor.run.get("phase"),
            "epoch": conductor.run.get("epoch", 0),
            "rounds_trained": sum(each["state"] == "trained" for each in conductor.training_rounds),
            "round": None if row is None else row | {"number": _number(conductor.rounds, row)},
            "problem": None if conductor.problem is None else conductor.problem.record,
            "strip": [] if conductor.strip is None else conductor.strip.view(),
        }
        if row is not None and conductor.activity != "away":
            answer |= await self._statistics(session, row)
        return answer

    async def _statistics(self, session: Session, row: Json) -> Json:
        everything = [choice for each in self._conductor.rounds for choice in await self._choices(each)]
        of_round = [choice for choice in everything if choice.round == row["id"]]
        own = [choice for choice in of_round if choice.rater == session.rater]
        trained = [choice for choice in everything if not choice.is_comparison]
        told: Json = {"mine": _plain(summary(trained, session.rater)), "hints": [], "comparison": None}
        if row["kind"] == "training":
            told["hints"] = hints_to_stop(own)
        else:
            result = compared(of_round)
            told["comparison"] = _plain(result) | {"rate": _plain(result.rate), "p": result.p}
        if session.is_owner:
            told |= {"raters": sorted({choice.rater for choice in everything}), "agreement": agreement(trained)}
        return told

    def _repeats(self, row: Json) -> float:
        labels = self._conductor.labels
        return labels.repeats if labels is not None and row["kind"] == "training" else 0.0

    async def _choices(self, row: Json) -> list[Choice]:
        """Choices of a round; those of a closed one are read once."""
        name = str(row["id"])
        if name not in self._closed:
            told = await self._opinions(name)
            choices = [_choice(name, row["kind"] == "comparison", each) for each in told if each.get("choice")]
            if row["state"] != "trained":
                return choices
            self._closed[name] = choices
        return self._closed[name]

    async def _opinions(self, name: str, rater: str | None = None) -> list[Json]:
        query = {} if rater is None else {"rater": rater}
        told: list[Json] = (await self._link.get(f"/v1/rounds/{name}/feedback", query))["opinions"]
        return told


def _showing(pair: Json, is_repeat: bool, attempt: int) -> Json:
    left, right = (pair["right"], pair["left"]) if is_repeat else (pair["left"], pair["right"])
    return {
        "pair_id": pair["pair_id"], "prompt": pair["prompt"], "left": left, "right": right, "repeat": is_repeat,
        "attempt": attempt,
    }  # fmt: skip


def _choice(name: str, is_comparison: bool, told: Json) -> Choice:
    return Choice(
        event=told["event"], round=name, pair=told["pair_id"], rater=told["rater"], choice=told["choice"],
        rewards=(told["rewards"][0], told["rewards"][1]), is_comparison=is_comparison,
        is_repeat=bool(told.get("swapped")), is_withdrawn=told["withdrawn"], ms=told.get("ms"), flips=told.get("flips"),
        zooms=told.get("zooms"), time=told["time"],
    )  # fmt: skip


def _answer(choice: Choice) -> Json:
    return {"event": choice.event, "pair_id": choice.pair, "choice": choice.choice, "repeat": choice.is_repeat}


def _number(rounds: list[Json], row: Json) -> int:
    """Which one of its kind it is, from 1."""
    return sum(other["kind"] == row["kind"] and other["operation"] <= row["operation"] for other in rounds)


def _plain(record: Any) -> Json:
    """A dataclass, with the value of each share in it."""
    plain = asdict(record)
    for shown in (plain, *(value for value in plain.values() if isinstance(value, dict))):
        if "total" in shown:
            shown["value"] = shown["count"] / shown["total"] if shown["total"] else None
    return plain
