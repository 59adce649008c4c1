"""The whole run: sample, score, update, evaluate, save, until the epochs are done; resumes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.config import BatchPlan, Config
from fdfo_engine.engine import Engine
from fdfo_engine.evaluation import Evaluation, evaluate, evaluation_list, evaluation_prompts, metric_rewards
from fdfo_engine.evaluation.guard_watch import GuardWatch
from fdfo_engine.models.registry import agreed_base
from fdfo_engine.resources import memory_record
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.rewards.background import BackgroundScorer
from fdfo_engine.rewards.spike import SpikeWatch
from fdfo_engine.rollout.prompts import PromptList, describe_prompts, load_prompts
from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.distributed import (
    all_agree_hash,
    all_gather_rows,
    any_rank,
    any_text,
    barrier,
    on_main,
    setup_distributed,
    together,
    world_size,
)
from fdfo_engine.runtime.errors import (
    CheckpointError,
    GuardStop,
    NumericsError,
    RewardError,
    Stopped,
    error_message,
    exit_code,
)
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, RunFolder, checkpoint_store, read_log, stored_config
from fdfo_engine.runtime.run_log import IMAGES_NAME, SilentLog, open_run_log
from fdfo_engine.runtime.run_status import State
from fdfo_engine.runtime.stop import StopRequest
from fdfo_engine.runtime.timing import PhaseTimer
from fdfo_engine.trajectory import Rollout, UnscoredRollout

MAX_TIED_EPOCHS = 3
ROOM_FOR_CHECKPOINTS = 4  # those that are kept, a pinned one, and the one that is written before the oldest goes


def run(config: Config, *, resume: bool = False, base_has_moved: bool = False) -> None:
    """Trains until `run.epochs`; the same settings and folder continue an interrupted run bit for bit.

    Collective. Cheap checks come first: ranks, prompts, rewards, the folder; then the model.

    Args:
        config: the settings.
        resume: insist that there is a checkpoint to continue from.
        base_has_moved: `model.id` is where the base model lies now; of a run that recorded no base it is trusted.

    Raises:
        FdfoError, ConfigError: what a user can mend; the class carries the exit code. `status.json` says the same.
        Stopped: a signal asked for it; the run is resumable.
    """
    setup_distributed("cuda" if torch.cuda.is_available() else "cpu")
    plan = BatchPlan.from_config(config, world_size())
    prompts = load_prompts(config.prompts, config.run.seed)
    all_agree_hash(prompts.sha256, "the prompt list")
    held_out = evaluation_prompts(config)
    rewards = WeightedRewards.from_config(config.rewards, Path(config.run.dir) / "logs")
    metrics = metric_rewards(config)
    on_main(rewards.require_ready)
    on_main(metrics.require_ready)
    rewards.require_prompts(prompts.prompts)
    metrics.require_prompts(held_out)
    _require_resumable(config, resume)
    say(plan.describe())
    say(describe_prompts(prompts, config.sampling.pairs_per_epoch))
    if config.evaluation.every and config.evaluation.prompts:
        say(f"evaluation: {describe_prompts(evaluation_list(config))}")
    base = agreed_base(config)
    folder = on_main(lambda: RunFolder.of(config, base.record, has_moved=base_has_moved))
    try:
        together(lambda: None if folder is None else folder.require_prompts(prompts.sha256))
        with StopRequest() as stop:
            _Run(config, prompts, rewards, folder, stop).train()
    except BaseException as error:
        _tell(folder, error)
        raise
    finally:
        if folder is not None:
            folder.close()


class _Run:
    """One run in progress."""

    def __init__(
        self, config: Config, prompts: PromptList, rewards: WeightedRewards, folder: RunFolder | None, stop: StopRequest
    ) -> None:
        self._config, self._prompts, self._rewards, self._folder, self._stop = config, prompts, rewards, folder, stop
        self._metrics = metric_rewards(config)
        self._tied_epochs = 0
        self._spikes = SpikeWatch()
        self._has_described = False
        self._unscored = UnscoredRollout(Path(config.run.dir) / "unscored")
        self._status("starting")
        self._engine = Engine(config)
        say(f"pair ops run on {self._engine.backend}, the model on {self._engine.device}")
        if self._engine.memory is not None:
            say(self._engine.memory.describe())
        resumed = self._engine.load()
        if resumed:
            say(f"resuming after epoch {self._engine.epoch} of {config.run.epochs}")
            self._status(last_checkpoint=f"epoch_{self._engine.epoch:06d}")
        self._resumed = resumed
        on_main(self._prepare_folder)
        self._kept_epoch = self._engine.epoch
        self._is_updating = False
        self._log = together(self._open_log)
        self._timer = PhaseTimer(self._engine.device)
        self._guard = GuardWatch(self._engine, rewards, self._save)

    def _prepare_folder(self) -> None:
        assert self._folder is not None
        self._folder.truncate_logs(self._engine.epoch if self._resumed else -1)
        self._folder.require_room(ROOM_FOR_CHECKPOINTS * self._engine.checkpoint_bytes)

    def _open_log(self) -> SilentLog:
        config = self._config
        return open_run_log(
            Path(config.run.dir), epochs=config.run.epochs, first_epoch=self._engine.epoch,
            tensorboard=config.log.tensorboard, wandb=config.log.wandb, settings=config.model_dump(),
        )  # fmt: skip

    def train(self) -> None:
        """All epochs that are left."""
        engine, epochs = self._engine, self._config.run.epochs
        if engine.epoch >= epochs:
            say(f"finished already: {engine.epoch} of {epochs} epochs; raise run.epochs to go on")
        if not self._resumed or any_rank(bool(on_main(self._lacks_evaluation))):
            self._evaluate()
        self._guard.heed()
        self._status("running")
        while engine.epoch < epochs:
            try:
                self._train_epoch()
                every = self._config.evaluation.every
                if every and (engine.epoch % every == 0 or engine.epoch == epochs):
                    self._evaluate()
                    self._guard.heed()
            except GuardStop:
                raise
            except (RewardError, NumericsError, Stopped):
                self._keep_whole_epochs()
                raise
            if engine.epoch % self._config.checkpoint.every == 0 or engine.epoch == epochs:
                self._save()
            if any_rank(self._stop.poll()):
                self._stop_here()
        on_main(self._log.close)
        self._status("finished", phase=None, exit_code=0)
        barrier("the end")  # a rank that leaves first takes its connections down under the others

    def _train_epoch(self) -> None:
        engine, timer = self._engine, self._timer
        timer.take()
        rollout, scores = self._sample_and_score()
        parts_PK = {name: all_gather_rows(s.view(-1, 2)) for name, s in scores.items()}
        total_PK = self._rewards.combined(parts_PK)
        if len(parts_PK) > 1 and not self._has_described:
            say(self._rewards.describe(parts_PK))
            self._has_described = True
        with self._kept_unless_scored(rollout):
            self._guard_failures(rollout, total_PK, parts_PK)
        known = total_PK[torch.isfinite(total_PK)]
        jump = self._spikes.seen(float(known.mean()), float(known.std(correction=0))) if len(known) else None
        self._draw(rollout, total_PK, always=jump is not None)
        if jump:
            warn(f"{jump}; its pairs are drawn under {IMAGES_NAME}/")
        engine.poll = self._beat
        self._is_updating = True
        self._status(phase="update")
        with timer.phase("update"):
            metrics = engine.update(rollout, total_PK)
        self._is_updating = False
        record = self._record(rollout, total_PK, parts_PK, metrics)
        on_main(lambda: self._log.epoch(record))
        self._status("running", phase=None)
        self._guard_ties(metrics)

    def _sample_and_score(self) -> tuple[Rollout, dict[str, Tensor]]:
        """The next pairs and their scores; or those that a reward failed on when the run stopped."""
        engine, timer = self._engine, self._timer
        self._status(phase="rollout")
        overlap = self._config.sampling.overlap_scoring
        with BackgroundScorer(self._rewards, overlap=overlap, poll=self._is_stopping) as scorer:
            engine.poll = partial(self._before_block, scorer)
            rollout = self._unscored.take(engine.next_pair, engine.weights_version, engine.device)
            with timer.phase("rollout"):
                if rollout is None:
                    pair_ids = range(engine.next_pair, engine.next_pair + self._config.sampling.pairs_per_epoch)
                    rollout = engine.rollout(self._prompts.of_pairs(pair_ids), partial(_submit, scorer))
                else:
                    engine.next_pair += rollout.num_pairs
                    _submit_all(scorer, rollout)
            self._status(phase="reward")
            with timer.phase("reward"), self._kept_unless_scored(rollout):
                while any_rank(not scorer.is_done() and not self._is_stopping()):
                    pass  # a rank whose scores are there does not wait for the others inside one collective
                scores = together(scorer.scores)
        timer.seconds |= {"reward_waited": scorer.waited_s, "reward_hidden": scorer.hidden_s}
        return rollout, scores

    @contextmanager
    def _kept_unless_scored(self, rollout: Rollout) -> Iterator[None]:
        """Nothing was learnt from these pairs: they are next again, and need not be sampled again."""
        try:
            yield
        except (RewardError, Stopped):
            self._engine.next_pair = rollout.first_pair
            self._keep_whole_epochs()
            self._unscored.keep(rollout)
            raise

    def _record(
        self, rollout: Rollout, total_PK: Tensor, parts_PK: dict[str, Tensor], metrics: dict[str, float]
    ) -> dict[str, Any]:
        seconds = self._timer.take()
        known = total_PK[torch.isfinite(total_PK)]
        parts = {f"reward_{name}_mean": float(p[torch.isfinite(p)].mean()) for name, p in parts_PK.items()}
        images = 2 * rollout.num_pairs
        return {
            "epoch": self._engine.epoch,
            "first_pair": rollout.first_pair,
            "pairs": rollout.num_pairs,
            "reward_mean": float(known.mean()),
            "reward_std": float(known.std()) if len(known) > 1 else 0.0,
            **parts,
            **self._rewards.disagreements(parts_PK),
            **self._rewards.note_means(),
            **metrics,
            "lr": self._config.optimizer.lr,
            "kernel_backend": self._engine.backend,
            "micro_batch": self._engine.micro_batch,
            **memory_record(self._engine.memory, self._engine.device),
            **seconds,
            "images_per_second": images / seconds["seconds_rollout"],
        }

    def _evaluate(self) -> None:
        settings = self._config.evaluation
        if not settings.every:
            return
        self._status(phase="evaluation")
        result = evaluate(self._engine, evaluation_prompts(self._config), self._metrics, seed=settings.seed)
        record = result.record(self._engine, "auto", settings.seed)
        if settings.guard.action != "off":
            record["guard"] = on_main(lambda: self._guard.findings(record))
        on_main(lambda: self._keep_evaluation(result, record))
        self._status(phase=None)

    def _keep_evaluation(self, result: Evaluation, record: dict[str, Any]) -> None:
        self._log.evaluation(record)
        scores = {name: values.tolist() for name, values in result.scores.items()}
        self._log.evaluation_images(self._engine.epoch, result.prompts, result.images, scores)

    def _lacks_evaluation(self) -> bool:
        """Whether the last evaluation that was due failed: the run resumes after it."""
        epoch, every = self._engine.epoch, self._config.evaluation.every
        if not every or (epoch % every and epoch != self._config.run.epochs):
            return False
        lines = read_log(Path(self._config.run.dir) / EVALUATIONS_NAME)
        return not lines or int(lines[-1]["epoch"]) < epoch

    def _save(self, *, again: bool = False) -> None:
        """Saves the weights of the last whole epoch, if no checkpoint holds them yet, or `again`."""
        if self._engine.epoch == self._kept_epoch and not again:
            return
        path = self._engine.save()
        self._kept_epoch = self._engine.epoch
        self._status(last_checkpoint=path.name)

    def _keep_whole_epochs(self) -> None:
        """What was trained is not lost with the epoch that fails. Amid an update the weights are of no epoch."""
        if self._is_updating:
            say(f"the weights are amid an epoch; the last checkpoint is epoch {self._kept_epoch}")
        elif self._engine.epoch > self._kept_epoch:
            self._save()
            say(f"saved epoch {self._engine.epoch}; the same command goes on from there")

    def _draw(self, rollout: Rollout, total_PK: Tensor, *, always: bool = False) -> None:
        epoch, every = self._engine.epoch + 1, self._config.log.images_every
        if not always and (not every or epoch % every):
            return
        shown = min(8, len(rollout.prompts))
        rewards = total_PK[rollout.local_rows][:shown].flatten().tolist()
        captions = [f"{rollout.prompts[i // 2]} {reward:.2f}" for i, reward in enumerate(rewards)]
        images = rollout.images[:shown].flatten(0, 1)
        on_main(lambda: self._log.images(f"pairs_epoch_{epoch:06d}", images, captions))

    def _guard_failures(self, rollout: Rollout, total_PK: Tensor, parts_PK: dict[str, Tensor]) -> None:
        lost = int((~torch.isfinite(total_PK)).any(1).sum())
        limit = self._config.update.max_bad_pairs
        if lost:
            warn(f"{lost} of {len(total_PK)} pairs have no reward and pull at nothing")
        if lost > limit * len(total_PK):
            self._draw(rollout, total_PK, always=True)
            raise RewardError(
                f"{lost} of {len(total_PK)} pairs have no reward (update.max_bad_pairs = {limit}); "
                f"the run stops before epoch {self._engine.epoch + 1} changes anything\n"
                f"the first: {self._first_lost(rollout, parts_PK)}"
            )

    def _first_lost(self, rollout: Rollout, parts_PK: dict[str, Tensor]) -> str:
        name, part = next((n, p) for n, p in parts_PK.items() if not torch.isfinite(p).all())
        pair, branch = (~torch.isfinite(part)).nonzero()[0].tolist()
        pair_id = rollout.first_pair + pair
        (prompt,) = self._prompts.of_pairs([pair_id])
        gave = f"reward {name!r} gave {part[pair, branch]:g} to pair {pair_id}, branch {branch}, prompt {prompt!r}"
        raised = any_text(self._rewards.last_failure.get(name, ""))
        return f"{gave}\nits last exception: {raised}" if raised else gave

    def _guard_ties(self, metrics: dict[str, float]) -> None:
        if metrics["optimizer_steps"] or metrics["skipped_steps"]:
            self._tied_epochs = 0
            return
        self._tied_epochs += 1
        names = ", ".join(self._rewards.rewards)
        warn(f"no pair has a better image: no optimiser step was taken; is {names} seeing the images?")
        if self._tied_epochs >= MAX_TIED_EPOCHS:
            raise RewardError(f"{MAX_TIED_EPOCHS} epochs in a row without a single opinion from {names}")

    def _before_block(self, scorer: BackgroundScorer) -> None:
        while any_rank(not scorer.has_room() and not self._is_stopping()):
            pass  # as below: nobody waits long inside one collective
        if any_rank(self._stop.poll()):
            self._stop_here()

    def _stop_here(self) -> None:
        """Weights are those of the last whole epoch: a checkpoint of it is exact."""
        self._save()
        raise Stopped(f"{self._stop.reason or 'asked on another rank'}: stopped after epoch {self._engine.epoch}")

    def _is_stopping(self) -> bool:
        self._beat()
        return self._stop.poll()

    def _beat(self) -> None:
        if self._folder is not None:
            _say_how_it_goes(self._folder.status.beat)

    def _status(self, state: Any = None, **fields: Any) -> None:
        if self._folder is not None:
            epoch = self._engine.epoch if hasattr(self, "_engine") else 0
            fields |= {"epoch": epoch, "epochs": self._config.run.epochs}
            _say_how_it_goes(partial(self._folder.status.update, state, **fields))


def _say_how_it_goes(write: Callable[[], None]) -> None:
    """Writes the status: on one rank, amid what all do together. Where that fails the next real write fails for all."""
    try:
        write()
    except CheckpointError as error:
        warn(f"no status: {error_message(error)}")


def _submit(scorer: BackgroundScorer, prompts: Sequence[str], images_PK: Tensor) -> None:
    scorer.submit([prompt for prompt in prompts for _ in range(2)], images_PK.flatten(0, 1))


def _submit_all(scorer: BackgroundScorer, rollout: Rollout) -> None:
    """By the blocks in which it was sampled: scores then are as they would have been."""
    for block in sorted(set(rollout.blocks.tolist())):
        rows = (rollout.blocks == block).nonzero()[:, 0].tolist()
        _submit(scorer, [rollout.prompts[row] for row in rows], rollout.images[rows])


def _require_resumable(config: Config, resume: bool) -> None:
    """`--resume` on a folder without a checkpoint is an error, never a fresh start."""
    if not resume:
        return
    folder = Path(config.run.dir)
    if stored_config(folder) is None or not checkpoint_store(folder).names():
        raise CheckpointError(f"--resume: {folder} holds no checkpoint to resume from")


def _tell(folder: RunFolder | None, error: BaseException) -> None:
    if folder is not None:
        state: State = "stopped" if isinstance(error, Stopped | GuardStop) else "failed"
        fields = {"exit_code": exit_code(error), "message": error_message(error)}
        _say_how_it_goes(partial(folder.status.update, state, **fields))
