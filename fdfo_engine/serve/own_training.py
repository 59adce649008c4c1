"""The run's own training, an epoch at a time, between the operations of the queue."""

from __future__ import annotations

from fdfo_engine.engine import Engine
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.rollout.prompts import PromptList
from fdfo_engine.runtime.distributed import all_gather_rows, on_main, together


class OwnTraining:
    """Epochs by the run's own rewards. Every method is collective."""

    def __init__(self, engine: Engine, prompts: PromptList, rewards: WeightedRewards) -> None:
        self._engine, self._prompts, self._rewards = engine, prompts, rewards

    def epoch(self) -> bool:
        """Trains one epoch; false if all are done."""
        engine, config = self._engine, self._engine.config
        if engine.epoch >= config.run.epochs:
            return False
        on_main(self._rewards.require_ready)
        first = engine.next_pair
        rollout = engine.rollout(self._prompts.of_pairs(range(first, first + config.sampling.pairs_per_epoch)))
        prompts = [prompt for prompt in rollout.prompts for _ in range(2)]
        own = together(lambda: self._rewards(prompts, rollout.images.flatten(0, 1)))
        parts_PK = {name: all_gather_rows(scores.view(-1, 2)) for name, scores in own.items()}
        engine.update(rollout, self._rewards.combined(parts_PK))
        if engine.epoch % config.checkpoint.every == 0 or engine.epoch == config.run.epochs:
            engine.save()
        return True

    def pause(self) -> None:
        """Saves the last whole epoch."""
        if self._engine.epoch and not self._engine.is_amid_epoch:
            self._engine.save()
