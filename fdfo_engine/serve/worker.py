"""The engine's thread: takes operations from the queue, in order, on every rank; and repeats what a kill undid.

What a client was told stays true after a kill: the queue is on disk, everything an operation does follows from its body
and the weights before it, and a checkpoint names the last operation that it holds. A new process loads the newest
checkpoint and runs the operations behind it once more, without telling anybody again.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from fdfo_engine.engine import Engine
from fdfo_engine.loop import Training
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.distributed import any_rank, broadcast_text
from fdfo_engine.runtime.errors import (
    Cancelled,
    CheckpointError,
    DistributedError,
    Stopped,
    error_message,
    is_peer_loss,
)
from fdfo_engine.runtime.stop import StopRequest
from fdfo_engine.serve.backend import Backend
from fdfo_engine.serve.commands import Commands, Result
from fdfo_engine.serve.problems import Problem, problem_of
from fdfo_engine.serve.queue import Operation
from fdfo_engine.serve.rounds import COMPARISON_OPERATION
from fdfo_engine.serve.talk import Talk

CHANGES_THE_ENGINE = ("sample", "forward_backward", "optim_step", "snapshot", "load_state", "train")
_PATIENCE_S = 1.0
STALE_EPOCHS = 2
"""For how long a round that was sampled by a primitive can be trained on, with `allow_stale`."""


class Worker:
    """Serves the queue on all ranks; only rank 0 has a `backend`."""

    def __init__(
        self,
        engine: Engine,
        commands: Commands,
        training: Callable[[], Training],
        talk: Talk,
        backend: Backend | None,
        stop: StopRequest,
    ) -> None:
        """`training` begins the run's own training, which lasts until something else is asked for."""
        self._engine, self._commands, self._begin_training = engine, commands, training
        self._talk, self._backend, self._stop = talk, backend, stop
        self._training: Training | None = None
        engine.poll = self._poll
        if backend is not None:
            backend.interrupt = self._interrupt

    def serve(self) -> None:
        """Until a stop is asked for: then `Stopped` is raised, with everything acknowledged on disk."""
        self._recover()
        if self._backend is not None:
            self._backend.is_ready = True
        while not any_rank(self._stop.poll()):
            self._do(self._agreed(self._next()))
        self._settle_training()
        raise Stopped(
            f"{self._stop.reason or 'asked on another rank'}: the server stops after epoch {self._engine.epoch}"
        )

    def _next(self) -> dict[str, Any]:
        """What rank 0 wants done now; waits a little where there is nothing."""
        if self._backend is None:
            return {}
        self._report()
        backend = self._backend
        backend.has_work.clear()
        operation = backend.queue.start_next()
        if operation is not None:
            return {"do": "operation", "id": operation.id, "kind": operation.kind, "body": self._body(operation)}
        if backend.wish == "running":
            return {"do": "epoch"}
        if self._training is not None:
            return {"do": "pause"}
        backend.has_work.wait(_PATIENCE_S)
        return {"do": "nothing"}

    def _agreed(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0's task, on every rank. Collective."""
        agreed: dict[str, Any] = json.loads(broadcast_text(json.dumps(task)))
        return agreed

    def _do(self, task: dict[str, Any]) -> None:
        if task["do"] == "operation":
            self._settle_training()
            self._operation(task)
        elif task["do"] == "epoch":
            self._epoch()
        elif task["do"] == "pause":
            self._settle_training()

    # the run's own loop

    def _epoch(self) -> None:
        try:
            if self._training is None:
                self._training = self._begin_training()
                self._report()
                self._training.catch_up(resumed=True)
            goes_on = self._training.epoch()
        except Cancelled as error:
            if not any_rank(self._stop.poll()):
                self._end_training(error_message(error))
        except (DistributedError, Stopped):
            raise
        except Exception as error:
            if is_peer_loss(error):
                raise
            self._end_training(_told(error))  # told to who asks, and the server goes on
        else:
            if not goes_on:
                self._end_training(None)

    def _end_training(self, error: str | None) -> None:
        """After its last epoch, or where one failed: then the weights are those of the last whole one."""
        if self._backend is not None:
            self._backend.status["error"] = error
            self._backend.set_wish("idle")
        if self._engine.is_amid_epoch:
            self._training = None
            self._recover()

    def _settle_training(self) -> None:
        """Before anything else touches the weights: the epochs of the run's own training are no operations."""
        if self._training is not None and not self._engine.is_amid_epoch:
            self._training.save()
        self._training = None
        self._engine.poll = self._poll
        self._report()

    def _interrupt(self) -> None:
        """Ends what can be done again to the bit; an update that has begun is finished."""
        if self._talk.phase is None or self._talk.phase.name != "update":
            self._engine.cancel("POST /v1/run/stop")

    # operations

    def _operation(self, task: Mapping[str, Any]) -> None:
        number, kind = int(task["id"]), str(task["kind"])
        try:
            result = self._commands.run(kind, task["body"], number)
        except DistributedError:
            raise
        except Cancelled as error:
            self._finish(number, kind, None, error)
        except Stopped:
            if self._backend is not None:
                self._backend.queue.requeue(number)
            raise
        except Exception as error:
            if is_peer_loss(error):
                raise  # the operation stays in the queue: the next server does it
            self._finish(number, kind, None, error)  # the client's to hear of; the server goes on
            if kind == "train" and self._engine.is_amid_epoch:
                self._recover()
        else:
            self._finish(number, kind, result)

    def _finish(self, number: int, kind: str, result: Result | None, error: Exception | None = None) -> None:
        if self._backend is None:
            return
        queue = self._backend.queue
        if error is None:
            assert result is not None
            self._settle(number, kind, result)
        else:
            _told(error)
        self._report()  # before: who hears that it is over finds the run where it led
        queue.finish(number, result, None if error is None else problem_of(error).record)
        self._backend.bell.ring()

    def _settle(self, number: int, kind: str, result: Result) -> None:
        """What follows from an operation for the rounds; the same when it is done twice."""
        assert self._backend is not None
        rounds = self._backend.rounds
        if kind in ("sample", COMPARISON_OPERATION):
            self._backend.add_round(number, result)
        elif kind == "train":
            rounds.set_round_state(result["round"], "trained")
        elif kind == "load_state":
            for row in rounds.rounds():
                rounds.seal(row["id"])
        if result.get("checkpoint"):
            self._discard_rounds(result["epoch"])

    def _discard_rounds(self, epoch: int) -> None:
        """Trajectories that nobody can want any more, now that a checkpoint holds what they taught."""
        assert self._backend is not None
        for row in self._backend.rounds.rounds():
            is_old = row["seq"] is not None and row["epoch"] < epoch - STALE_EPOCHS
            if row["state"] == "trained" or is_old:
                self._commands.discard_round(row["id"])

    def _body(self, operation: Operation) -> dict[str, Any]:
        """The body as the commands take it: training gets the rewards that its feedback says."""
        if operation.kind != "train":
            return operation.body
        assert self._backend is not None
        return operation.body | {"rewards": self._backend.training_rewards(operation.body["round"])}

    # after a kill

    def _recover(self) -> None:
        engine = self._engine
        if engine.load():
            say(f"resuming after epoch {engine.epoch}")
        else:
            engine.save()  # what every later state can be had again from
        self._talk.open_logs(engine.epoch)
        self._commands.trained_versions = dict(engine.notes.get("trained_versions", {}))
        held = int(engine.notes.get("operation", 0))
        tasks = self._agreed({"tasks": self._to_repeat(held)})["tasks"]
        if tasks:
            say(f"repeating {len(tasks)} operations that the last checkpoint does not hold")
        self._talk.is_repeating = True
        for task in tasks:
            self._repeat(task)
        self._talk.is_repeating = False

    def _to_repeat(self, held: int) -> list[dict[str, Any]]:
        """Operations behind the checkpoint that moved the engine; those amid which the process died run anew."""
        if self._backend is None:
            return []
        queue = self._backend.queue
        for operation in queue.operations("running"):
            if operation.id == held:
                result = self._engine.notes["result"]
                self._settle(held, operation.kind, result)
                queue.finish(held, result)
            else:
                queue.requeue(operation.id)
        return [
            {
                "id": op.id,
                "kind": op.kind,
                "body": self._body(op),
                "failed": op.problem is not None,
                "problem": op.problem,
            }
            for op in queue.operations("done", "failed", after=held)
            if op.kind in CHANGES_THE_ENGINE
        ]

    def _repeat(self, task: Mapping[str, Any]) -> None:
        if task["failed"] and (task["problem"] or {}).get("code") == "cancelled":
            self._engine.primitives.discard()  # all that a cancelled one may have left
            return
        try:
            self._commands.run(task["kind"], task["body"], int(task["id"]))
        except (DistributedError, Stopped):
            raise
        except Exception as error:
            if is_peer_loss(error):
                raise
            if not task["failed"]:
                head = f"operation {task['id']} ({task['kind']}) was done, and fails when it is repeated"
                raise CheckpointError(f"{head}: {error_message(error)}") from error

    # talk

    def _poll(self) -> None:
        """Between two parts of work; where one rank raises, all do."""
        if self._stop.poll():
            raise Stopped(f"{self._stop.reason}: stopped amid epoch {self._engine.epoch + 1}")

    def _report(self) -> None:
        if self._backend is not None:
            engine = self._engine
            self._backend.status |= {
                "epoch": engine.epoch, "next_pair": engine.next_pair, "weights_version": engine.weights_version,
                "is_training": self._training is not None,
            }  # fmt: skip


def _told(error: BaseException) -> str:
    """The error's message; a bug of ours leaves its traceback in the log."""
    if not isinstance(error, Problem) and problem_of(error).body.code == "bug":
        traceback.print_exception(error, file=sys.stderr)
    return error_message(error)
