"""A run's own evaluations, and what its guard does about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fdfo_engine.config import Config
from fdfo_engine.engine import Engine
from fdfo_engine.evaluation import evaluate, evaluation_prompts, metric_rewards
from fdfo_engine.evaluation.guard_watch import GuardWatch, Save
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime import events
from fdfo_engine.runtime.best_checkpoint import Best, note_best
from fdfo_engine.runtime.checkpoint import checkpoint_name
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.distributed import any_rank, on_main
from fdfo_engine.runtime.run_events import Told
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, checkpoint_store, read_log
from fdfo_engine.runtime.run_pictures import evaluation_images


class Evaluations:
    """Every `evaluation.every` epochs and at the end. Every method is collective."""

    def __init__(self, engine: Engine, rewards: WeightedRewards, told: Told, save: Save) -> None:
        self._engine, self._told = engine, told
        self._metrics = metric_rewards(engine.config)
        self._guard = GuardWatch(engine, rewards, save)

    def is_due(self) -> bool:
        """Whether the epoch that has just ended is one to evaluate."""
        return _is_due(self._engine.config, self._engine.epoch)

    def catch_up(self, *, resumed: bool) -> None:
        """Evaluates what a run evaluates before it begins, or what a stop or a failure kept it from."""
        if self.is_due() and (not resumed or any_rank(bool(on_main(self._lacks_the_last)))):
            self._hold()
        self._guard.heed()

    def hold(self) -> None:
        """Evaluates if it is due.

        Raises:
            GuardStop: the guard ends the run.
        """
        if self.is_due():
            self._hold()
            self._guard.heed()

    def _hold(self) -> None:
        engine, settings = self._engine, self._engine.config.evaluation
        result = evaluate(engine, evaluation_prompts(engine.config), self._metrics, seed=settings.seed)
        record = result.record(engine, "auto", settings.seed)
        if settings.guard.action != "off":
            record["guard"] = on_main(lambda: self._guard.findings(record))
        self._told.tell(events.Metrics(epoch=engine.epoch, kind="evaluation", values=record))
        scores = {name: values.tolist() for name, values in result.scores.items()}
        self._told.tell(evaluation_images(engine.epoch, result.prompts, result.images, scores))
        engine.saving.finish(wait=True)
        on_main(lambda: self._note_best(record))

    def _note_best(self, record: dict[str, Any]) -> None:
        """Where a checkpoint holds the weights that were evaluated, and they beat the untrained ones."""
        folder, name = Path(self._engine.config.run.dir), checkpoint_name(self._engine.epoch)
        best = Best(name, record["reward"], record["reward_stderr"])
        untrained = [line.get("reward") for line in read_log(folder / EVALUATIONS_NAME)[:1] if line["epoch"] == 0]
        is_better = all(reward is None or best.reward > reward for reward in untrained)
        if is_better and name in checkpoint_store(folder).names() and note_best(folder, best):
            say(f"best so far: {best}")

    def _lacks_the_last(self) -> bool:
        return _lacks_evaluation(self._engine.config, self._engine.epoch)


def finished_epoch(config: Config) -> int:
    """The last epoch of a run whose folder shows that nothing is left to do; else 0. On rank 0.

    A guard that may end a run has the last word on it, and needs the engine: such a run counts as one with work left.
    """
    state = checkpoint_store(config.run.dir).newest_state()
    epoch = 0 if state is None else int(state["epoch"])
    owes = _is_due(config, epoch) and _lacks_evaluation(config, epoch)
    is_judged = config.evaluation.guard.action in ("off", "warn")
    return epoch if epoch >= config.run.epochs and is_judged and not owes else 0


def _is_due(config: Config, epoch: int) -> bool:
    every = config.evaluation.every
    return bool(every) and (epoch % every == 0 or epoch == config.run.epochs)


def _lacks_evaluation(config: Config, epoch: int) -> bool:
    """Whether the log of evaluations ends before `epoch`."""
    lines = read_log(Path(config.run.dir) / EVALUATIONS_NAME)
    return not lines or int(lines[-1]["epoch"]) < epoch
