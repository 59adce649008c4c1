"""The whole run: sample, score, update, evaluate, save, until the epochs are done; resumes by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fdfo_engine.config import BatchPlan, Config
from fdfo_engine.engine import Engine
from fdfo_engine.evaluation import evaluation_list, metric_rewards
from fdfo_engine.evaluation.overlap import warn_of_overlap
from fdfo_engine.models.registry import agreed_base
from fdfo_engine.planning.fit import memory_record
from fdfo_engine.rewards import WeightedRewards, with_own_rewards
from fdfo_engine.rollout.prompts import PromptList, describe_prompts, load_prompts
from fdfo_engine.runtime import events
from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.distributed import (
    all_agree_hash,
    barrier,
    lost_ranks_named,
    max_over_ranks,
    on_main,
    setup_distributed,
    together,
    world_size,
)
from fdfo_engine.runtime.errors import CheckpointError, GuardStop, NumericsError, RewardError, Stopped
from fdfo_engine.runtime.run_events import RunEvents, Told
from fdfo_engine.runtime.run_folder import METRICS_NAME, RunFolder, checkpoint_store, read_log, stored_config
from fdfo_engine.runtime.run_pictures import IMAGES_NAME, pairs_grid
from fdfo_engine.runtime.stop import Stopping, StopRequest
from fdfo_engine.runtime.timing import PhaseTimer
from fdfo_engine.runtime.watch import COLLECTIVE_TIMEOUTS, Watch
from fdfo_engine.training.evaluating import Evaluations, finished_epoch
from fdfo_engine.training.preflight import require_packages
from fdfo_engine.training.scoring import Scored, ScoredPairs
from fdfo_engine.training.watch import RewardWatch

MAX_DRAWN_PAIRS = 8


def run(
    config: Config,
    *,
    resume: bool = False,
    base_has_moved: bool = False,
    strict_resume: bool = False,
    allow_prompt_change: bool = False,
    rewards: Sequence[Callable[..., Any]] = (),
    on_event: events.Listener | None = None,
) -> list[dict[str, Any]]:
    """Trains until `run.epochs`; the same settings and folder continue an interrupted run bit for bit.

    Collective. Cheap checks come first: ranks, prompts, rewards, the folder; then the model.

    Args:
        config: the settings.
        resume: insist that there is a checkpoint to continue from.
        base_has_moved: `model.id` is where the base model lies now; of a run that recorded no base it is trusted.
        strict_resume: a damaged newest checkpoint is an error, instead of a reason to take the one before it.
        allow_prompt_change: an old run may go on with another prompt list than it began with.
        rewards: functions of one's own, instead of the config's rewards: `with_own_rewards`.
        on_event: called on rank 0 with each `Event` of this process. What it raises ends the run and reaches the
            caller.

    Returns:
        The metrics of every epoch of the run, as metrics.jsonl has them; on other ranks than 0 none.

    Raises:
        FdfoError, ConfigError: what a user can mend; the class carries the exit code. `status.json` says the same.
        Stopped: a signal asked for it; the run is resumable.
    """
    config = with_own_rewards(config, rewards)
    patience_s = COLLECTIVE_TIMEOUTS * config.comm.timeout_s
    setup_distributed("cuda" if torch.cuda.is_available() else "cpu", timeout_s=patience_s)
    plan = BatchPlan.from_config(config, world_size())
    prompts = load_prompts(config.prompts, config.run.seed, pairs_per_prompt=config.sampling.pairs_per_prompt)
    all_agree_hash(prompts.sha256, "the prompt list")
    require_packages(config)
    held_out = evaluation_list(config)
    evaluated = held_out.prompts[: config.evaluation.count]
    weighted = _ready_rewards(config, prompts.prompts, evaluated)
    _require_resumable(config, resume or strict_resume)
    say(plan.describe())
    say(describe_prompts(prompts, config.sampling.pairs_per_epoch))
    if config.evaluation.every and config.evaluation.prompts:
        say(f"evaluation: {describe_prompts(held_out)}")
    warn_of_overlap(config, prompts.prompts, evaluated)
    base = agreed_base(config)
    folder = on_main(lambda: RunFolder.of(config, base.record, has_moved=base_has_moved))
    try:
        with (
            StopRequest(leaves_at_once=True) as request,
            RunEvents(config, folder, request, on_event) as told,
            Watch(config.run.dir, config.comm.timeout_s, told.tell_end),
            lost_ranks_named(),
        ):
            together(lambda: None if folder is None else folder.require_prompts(prompts.sha256, allow_prompt_change))
            if not _is_over(config, told):
                engine = Engine(config, on_event=told.relay)
                engine.sampler.tell_cut(prompts.prompts)
                resumed = _opened(engine, told, strict=strict_resume)
                _train(Training(engine, prompts, weighted, told, request), told, resumed)
            barrier("the end")  # a rank that leaves first takes its connections down under the others
    finally:
        if folder is not None:
            folder.close()
    return on_main(lambda: read_log(Path(config.run.dir) / METRICS_NAME)) or []


def _opened(engine: Engine, told: RunEvents, *, strict: bool) -> bool:
    """Loads the newest checkpoint and opens the logs where it ends; whether there was one."""
    say(f"pair ops run on {engine.backend}, the model on {engine.device}")
    if engine.memory is not None:
        say(engine.memory.describe())
    resumed = engine.load(strict=strict)
    if resumed:
        say(f"resuming after epoch {engine.epoch} of {engine.config.run.epochs}")
    on_main(engine.checkpoints.record_kernels)
    on_main(lambda: told.open(engine.epoch if resumed else -1, engine.checkpoints_bytes))
    return resumed


def _is_over(config: Config, told: RunEvents) -> bool:
    """Whether nothing is left to do, of which no model needs to be loaded; says so. Collective."""
    epoch = max_over_ranks(on_main(lambda: finished_epoch(config)) or 0, "the last epoch")
    if not epoch:
        return False
    _say_finished(epoch, config)
    on_main(lambda: told.open(epoch, room=0))
    told.tell(events.State(epoch=epoch, state="running", epochs=config.run.epochs))
    return True


def _say_finished(epoch: int, config: Config) -> None:
    say(f"finished already: {epoch} of {config.run.epochs} epochs; raise run.epochs to go on")


def _train(training: Training, told: RunEvents, resumed: bool) -> None:
    """All epochs that are left."""
    epoch, epochs = training.engine.epoch, training.engine.config.run.epochs
    if epoch >= epochs:
        _say_finished(epoch, training.engine.config)
    told.tell(events.State(epoch=epoch, state="running", epochs=epochs))
    training.catch_up(resumed=resumed)
    try:
        while training.epoch():
            pass
        training.engine.saving.finish(wait=True)
    finally:
        training.engine.saving.carry_to_its_end()  # whatever ended the run


class Training:
    """Epochs by the run's own rewards, one at a time. Every method is collective."""

    def __init__(
        self, engine: Engine, prompts: PromptList, rewards: WeightedRewards, told: Told, request: StopRequest
    ) -> None:
        self.engine, self._config, self._rewards, self._told = engine, engine.config, rewards, told
        self._timer = PhaseTimer(engine.device)
        self._kept_epoch = engine.epoch
        self._describes_rewards = len(rewards.rewards) > 1
        self._stopping = Stopping(engine.progress, request)
        self._pairs = ScoredPairs(engine, prompts, rewards, self._timer, self._stopping)
        self._watch = RewardWatch(engine.config.update.max_bad_pairs, rewards)
        self._evaluations = Evaluations(engine, rewards, told, self.save)

    def catch_up(self, *, resumed: bool) -> None:
        """Evaluates what a run evaluates before its first epoch, or what a stop kept it from."""
        self._evaluations.catch_up(resumed=resumed)

    def epoch(self) -> bool:
        """Trains one epoch, evaluates and saves where that is due; false if all are done.

        Raises:
            Stopped: a signal asked for it; the last whole epoch is saved.
            GuardStop, RewardError, NumericsError: as the run would end; likewise.
        """
        engine, config = self.engine, self._config
        if engine.epoch >= config.run.epochs:
            return False
        engine.saving.finish(wait=False)
        try:
            self._stopping.stop_between_epochs()
            self._train_epoch()
            if self._evaluations.is_due() or self._stopping.comes_late:
                self._save_early()  # before what a stop, or a kill, may end
            self._evaluations.hold()
        except GuardStop:
            raise
        except (RewardError, NumericsError, Stopped):
            self._keep_whole_epochs()
            raise
        if engine.epoch % config.checkpoint.every == 0 or engine.epoch == config.run.epochs:
            self._begin_save()
        return True

    def _train_epoch(self) -> None:
        engine, watch = self.engine, self._watch
        self._timer.take()
        scored = self._pairs.next()
        if self._describes_rewards:
            say(self._rewards.describe(scored.parts))
            self._describes_rewards = False
        jump = watch.jump(scored)
        self._draw(scored, always=jump is not None or watch.lacks_rewards(scored))
        with self._pairs.kept_unless_trained(scored.rollout):
            watch.require_rewards(scored, engine.epoch + 1)
            if jump is not None:
                warn(f"{jump}; its pairs are drawn under {IMAGES_NAME}/")
            began = time.monotonic()
            with self._timer.phase("update"):
                metrics = engine.update(scored.rollout, scored.total)
            self._stopping.took(time.monotonic() - began)
        self._told.tell(events.Metrics(epoch=engine.epoch, kind="epoch", values=self._record(scored, metrics)))
        watch.require_opinions(metrics)

    def save(self, *, again: bool = False) -> None:
        """Saves the weights of the last whole epoch, if no checkpoint holds them yet, or `again`; then it is there."""
        if self.engine.epoch != self._kept_epoch or again:
            self.engine.save()
            self._kept_epoch = self.engine.epoch
        self.engine.saving.finish(wait=True)

    def _begin_save(self) -> None:
        """As `save`, but written beside what follows."""
        if self.engine.epoch != self._kept_epoch:
            self.engine.begin_save()
            self._kept_epoch = self.engine.epoch

    def _save_early(self) -> None:
        """Before an evaluation; a guard may take the run back to this checkpoint, which then has to be there."""
        if self._config.evaluation.guard.action == "off":
            self._begin_save()
        else:
            self.save()

    def _keep_whole_epochs(self) -> None:
        """What was trained is not lost with the epoch that fails. Amid an update the weights are of no epoch."""
        self.engine.saving.finish(wait=True)
        if self.engine.is_amid_epoch:
            say(f"the weights are amid an epoch; the last checkpoint is epoch {self._kept_epoch}")
        elif self.engine.epoch > self._kept_epoch:
            self.save()
            say(f"saved epoch {self.engine.epoch}; the same command goes on from there")

    def _record(self, scored: Scored, metrics: dict[str, float]) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        seconds = self._timer.take()
        known = scored.total[torch.isfinite(scored.total)]
        parts = {f"reward_{name}_mean": float(p[torch.isfinite(p)].mean()) for name, p in scored.parts.items()}
        return {
            "epoch": self.engine.epoch,
            "first_pair": scored.rollout.first_pair,
            "pairs": scored.rollout.num_pairs,
            "reward_mean": float(known.mean()),
            "reward_std": float(known.std()) if len(known) > 1 else 0.0,
            **parts,
            **self._rewards.disagreements(scored.parts),
            **self._rewards.note_means(),
            **metrics,
            "lr": self._config.optimizer.lr,
            "kernel_backend": self.engine.backend,
            "micro_batch": self.engine.micro_batch,
            **memory_record(self.engine.memory, self.engine.device),
            **seconds,
            "images_per_second": 2 * scored.rollout.num_pairs / seconds["seconds_rollout"],
        }

    def _draw(self, scored: Scored, *, always: bool) -> None:
        epoch, every = self.engine.epoch + 1, self._config.log.images_every
        if not always and (not every or epoch % every):
            return
        rollout = scored.rollout
        shown = min(MAX_DRAWN_PAIRS, len(rollout.prompts))
        rewards_PK = scored.total[rollout.local_rows][:shown]
        name, images = f"pairs_epoch_{epoch:06d}", rollout.images[:shown]
        self._told.tell(pairs_grid(name, epoch, images, rollout.prompts[:shown], rewards_PK.tolist()))


def _ready_rewards(config: Config, trained: Sequence[str], evaluated: Sequence[str]) -> WeightedRewards:
    """The run's rewards, once they and the evaluation's metrics have said that they can score."""
    rewards = WeightedRewards.from_config(config.rewards, Path(config.run.dir) / "logs")
    metrics = metric_rewards(config)
    on_main(rewards.require_ready)
    on_main(metrics.require_ready)
    rewards.require_prompts(trained)
    metrics.require_prompts(evaluated)
    return rewards


def _require_resumable(config: Config, resume: bool) -> None:
    """`--resume` on a folder without a checkpoint is an error, never a fresh start."""
    if not resume:
        return
    folder = Path(config.run.dir)
    if stored_config(folder) is None or not checkpoint_store(folder).names():
        raise CheckpointError(f"--resume: {folder} holds no checkpoint to resume from")
