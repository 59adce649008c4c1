"""The guard at work in a run: judges each evaluation, and stops the run or takes it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fdfo_engine.engine import Engine
from fdfo_engine.evaluation.guard import findings, last_in_order, out_of_order
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime.checkpoint import checkpoint_name
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.distributed import any_rank, max_over_ranks, on_main
from fdfo_engine.runtime.errors import GuardStop
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME, checkpoint_store, read_log


class Save(Protocol):
    """Saves the weights of the last whole epoch, if no checkpoint holds them yet, or `again`."""

    def __call__(self, *, again: bool = False) -> None:
        """Collective."""


class GuardWatch:
    """Works on the run's own logs and keeps no state: a resumed run judges as an uninterrupted one would."""

    def __init__(self, engine: Engine, rewards: WeightedRewards, save: Save) -> None:
        self._engine, self._rewards, self._save = engine, rewards, save
        self._settings = engine.config.evaluation.guard
        self._folder = Path(engine.config.run.dir)

    def findings(self, record: dict[str, Any]) -> list[str]:
        """What is out of order at evaluation `record`, said as warnings too. On rank 0."""
        evaluations, epochs = (read_log(self._folder / name) for name in (EVALUATIONS_NAME, METRICS_NAME))
        epochs = [line | {"reward_mean": self._rewards.plain_mean(line)} for line in epochs]
        found = findings([*evaluations, record], epochs, self._settings)
        for sentence in found:
            warn(f"guard, epoch {record['epoch']}: {sentence}")
        return found

    def heed(self) -> None:
        """Acts on what the evaluations so far say; collective.

        Raises:
            GuardStop: the run ends here, where it stands or back at the last checkpoint in order.
        """
        if self._settings.action == "off":
            return
        evaluations = on_main(lambda: read_log(self._folder / EVALUATIONS_NAME)) or []
        if self._settings.action == "rollback":
            self._pin_last_in_order(evaluations)
        is_over = self._settings.action != "warn" and out_of_order(evaluations) >= self._settings.patience
        if any_rank(is_over):
            self._stop(evaluations)

    def _pin_last_in_order(self, evaluations: list[dict[str, Any]]) -> None:
        epoch = last_in_order(evaluations)
        number = max_over_ranks(-1 if epoch is None else epoch)
        name = checkpoint_name(number)
        is_there = any_rank(name in checkpoint_store(self._folder).names())
        self._engine.checkpoints.pinned = name if is_there or number == self._engine.epoch else None
        if not is_there and number == self._engine.epoch:
            self._save(again=True)  # epoch 0 is kept for nothing else

    def _stop(self, evaluations: list[dict[str, Any]]) -> None:
        self._save()
        end, pinned = f"the run stops after epoch {self._engine.epoch}", self._engine.checkpoints.pinned
        if self._settings.action == "rollback" and pinned is not None:
            self._engine.load(pinned)
            self._save(again=True)  # drops what came after it
            end += f" and is back at {pinned}; the same settings would take the same way again"
        reasons = on_main(lambda: "; ".join(evaluations[-1]["guard"])) or "see rank 0"
        raise GuardStop(f"evaluation.guard: the training reward climbs, but {reasons}\n{end}")
