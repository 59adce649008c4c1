"""An epoch's pairs and what the rewards say of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from fdfo_engine.engine import Engine
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.rewards.background import BackgroundScorer
from fdfo_engine.rollout.prompts import PromptList
from fdfo_engine.runtime.distributed import all_gather_rows, any_rank, together
from fdfo_engine.runtime.errors import NumericsError, RewardError, Stopped
from fdfo_engine.runtime.stop import Stopping
from fdfo_engine.runtime.timing import PhaseTimer
from fdfo_engine.trajectory import Rollout, UnscoredRollout


@dataclass(frozen=True)
class Scored:
    """A rollout; and of all its pairs, over all ranks, the prompts and `[P, 2]` each reward's scores and their sum."""

    rollout: Rollout
    prompts: list[str]
    parts: dict[str, Tensor]
    total: Tensor


class ScoredPairs:
    """Samples and scores, the one beside the other. Every method is collective."""

    def __init__(
        self, engine: Engine, prompts: PromptList, rewards: WeightedRewards, timer: PhaseTimer, stopping: Stopping
    ) -> None:
        self._engine, self._prompts, self._rewards = engine, prompts, rewards
        self._timer, self._stopping = timer, stopping
        self._unscored = UnscoredRollout(Path(engine.config.run.dir) / "unscored")

    def next(self) -> Scored:
        """The next pairs and their scores; or those that a reward failed on when the run stopped."""
        settings = self._engine.config.sampling
        with BackgroundScorer(self._rewards, overlap=settings.overlap_scoring, poll=self._stopping.is_asked) as scorer:
            self._engine.poll = partial(self._before_block, scorer)
            with self._timer.phase("rollout"):
                rollout = self._sampled(scorer, settings.pairs_per_epoch)
            self._engine.poll = self._stopping.look
            with self._timer.phase("reward"), self.kept_unless_trained(rollout):
                own = self._scores(scorer)
        self._timer.seconds |= {"reward_waited": scorer.waited_s, "reward_hidden": scorer.hidden_s}
        parts_PK = {name: all_gather_rows(scores.view(-1, 2)) for name, scores in own.items()}
        prompts = self._prompts.of_pairs(range(rollout.first_pair, rollout.first_pair + rollout.num_pairs))
        return Scored(rollout, prompts, parts_PK, self._rewards.combined(parts_PK))

    @contextmanager
    def kept_unless_trained(self, rollout: Rollout) -> Iterator[None]:
        """Where the weights learnt nothing from these pairs they are next again, and need not be sampled again."""
        try:
            yield
        except (RewardError, NumericsError, Stopped):
            self._engine.next_pair = rollout.first_pair
            if not self._engine.is_amid_epoch:
                self._unscored.keep(rollout)
            raise

    def _sampled(self, scorer: BackgroundScorer, count: int) -> Rollout:
        engine = self._engine
        kept = self._unscored.take(engine.next_pair, engine.weights_version, engine.device)
        if kept is not None:
            engine.next_pair += kept.num_pairs
            _submit_all(scorer, kept)
            return kept
        prompts = self._prompts.of_pairs(range(engine.next_pair, engine.next_pair + count))
        return engine.rollout(prompts, partial(_submit, scorer))

    def _scores(self, scorer: BackgroundScorer) -> dict[str, Tensor]:
        """A rank whose scores are there does not wait for the others inside one collective."""
        with self._engine.progress.phase("reward", total=scorer.submitted, unit="blocks") as phase:
            phase.reach(scorer.scored)
            while any_rank(not scorer.is_done()):
                phase.reach(scorer.scored)
            return together(scorer.scores)

    def _before_block(self, scorer: BackgroundScorer) -> None:
        while any_rank(not scorer.has_room() and not self._stopping.is_asked()):
            pass  # nobody waits long inside one collective
        self._stopping.look()


def _submit(scorer: BackgroundScorer, prompts: Sequence[str], images_PK: Tensor) -> None:
    scorer.submit([prompt for prompt in prompts for _ in range(2)], images_PK.flatten(0, 1))


def _submit_all(scorer: BackgroundScorer, rollout: Rollout) -> None:
    """By the blocks in which it was sampled: scores then are as they would have been."""
    for block in sorted(set(rollout.blocks.tolist())):
        rows = (rollout.blocks == block).nonzero()[:, 0].tolist()
        _submit(scorer, [rollout.prompts[row] for row in rows], rollout.images[rows])
