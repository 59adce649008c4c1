"""Tells other machines how a run is doing, by POST: a webhook, and Kubeflow's trainer. Never fatal, never waited for.

Kubeflow Trainer (v2, feature gate TrainJobRuntimeStatus) sets three variables in the pods of a job. Its guide on
progress of TrainJobs says what is to be posted, and that the token's file is to be read anew, since it rotates.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import urllib3

from fdfo_engine.runtime import events
from fdfo_engine.runtime.console import warn

PHASES_EVERY_S = 10.0
"""Of a phase's progress no more is posted than one event in this time."""

KUBEFLOW_EVERY_S = 5.0
"""What Kubeflow's guide asks of clients at most."""

_TIMEOUT_S = 5.0
_LAST_WORDS_S = 10.0
_MOST_WAITING = 256
_KUBEFLOW = tuple(f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))


class _Mailbox:
    """Posts bodies one after another from a thread; of too many that wait, the oldest are dropped."""

    def __init__(self, name: str, url: str, **pool: Any) -> None:
        self._name, self._url = name, url
        self._pool = urllib3.PoolManager(maxsize=1, **pool)
        self._waiting: deque[tuple[bytes, dict[str, str]]] = deque(maxlen=_MOST_WAITING)
        self._changed = threading.Condition()
        self._is_closed = self._has_failed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Queues a body."""
        with self._changed:
            self._waiting.append((body, {"Content-Type": "application/json", **headers}))
            self._changed.notify()

    def close(self) -> None:
        """Gives what still waits ten seconds to get through."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_LAST_WORDS_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                body, headers = self._waiting.popleft()
            self._send(body, headers)

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        try:
            reply = self._pool.request(
                "POST", self._url, body=body, headers=headers, timeout=_TIMEOUT_S, retries=False, redirect=False
            )
            reason = "" if reply.status < 400 else f"HTTP {reply.status}"
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            reason = type(error).__name__  # its text would repeat the address, which may be a secret one
        if reason and not self._has_failed:
            warn(f"{self._name}: {reason}; the run goes on, and it is tried again with what comes next")
        self._has_failed = bool(reason)


class Webhook:
    """A listener that posts each event as its line of events.jsonl, of a phase only now and then.

    FDFO_WEBHOOK_KEY, where it is set, goes along as a bearer token.
    """

    def __init__(self, url: str) -> None:
        self._mailbox = _Mailbox("log.webhook", url)
        self._phase: str | None = None
        self._posted_s = 0.0

    def __call__(self, event: events.Event) -> None:
        """Queues the event."""
        if isinstance(event.data, events.Phase):
            data, now = event.data, time.monotonic()
            if data.name == self._phase and data.done != data.total and now - self._posted_s < PHASES_EVERY_S:
                return
            self._phase, self._posted_s = data.name, now
        key = os.environ.get("FDFO_WEBHOOK_KEY")
        self._mailbox.post(event.line(), {"Authorization": f"Bearer {key}"} if key else {})

    def close(self) -> None:
        """Waits for the last events, ten seconds at most."""
        self._mailbox.close()


class KubeflowStatus:
    """A listener that keeps Kubeflow's TrainJob up to date: per cent, seconds left, the last epoch's numbers."""

    def __init__(self, epochs: int) -> None:
        """`epochs` of the whole run; the variables of `is_kubeflow` must be set."""
        url, certificate, self._token_file = (os.environ[name] for name in _KUBEFLOW)
        self._mailbox = _Mailbox("Kubeflow's trainer", url, ca_certs=certificate)
        self._epochs = epochs
        self._first: tuple[int, float] | None = None
        self._posted_s = float("-inf")

    def __call__(self, event: events.Event) -> None:
        """Queues the numbers of an epoch, at most every five seconds; those of the last one always."""
        data = event.data
        if isinstance(data, events.State) and data.state == "running":
            self._first = (data.epoch, event.time)
        if not isinstance(data, events.Metrics) or data.kind != "epoch":
            return
        if time.monotonic() - self._posted_s < KUBEFLOW_EVERY_S and data.epoch < self._epochs:
            return
        self._posted_s = time.monotonic()
        token = Path(self._token_file).read_text().strip() if Path(self._token_file).is_file() else ""
        body = json.dumps({"trainerStatus": self._status(data, event.time)})
        self._mailbox.post(body.encode(), {"Authorization": f"Bearer {token}"})

    def close(self) -> None:
        """Waits for the last numbers, ten seconds at most."""
        self._mailbox.close()

    def _status(self, data: events.Metrics, now: float) -> dict[str, Any]:
        status: dict[str, Any] = {
            "progressPercentage": min(100, 100 * data.epoch // self._epochs),
            "metrics": [
                {"name": name, "value": f"{value:.6g}"}
                for name, value in data.values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ],
            "lastUpdatedTime": datetime.fromtimestamp(now, UTC).isoformat(),
        }
        if self._first is not None and data.epoch > self._first[0]:
            per_epoch = (now - self._first[1]) / (data.epoch - self._first[0])
            status["estimatedRemainingSeconds"] = max(0, round(per_epoch * (self._epochs - data.epoch)))
        return status


def is_kubeflow() -> bool:
    """Whether Kubeflow's trainer asks to be told: all three of its variables are set."""
    return all(os.environ.get(name) for name in _KUBEFLOW)
