"""`Engine`: sample pairs, update on rewards from anywhere, generate, save, export. What frontends call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.algorithms import build_algorithm
from fdfo_engine.config import BatchPlan, Config, dump_config
from fdfo_engine.exporting import Weights, base_of_run, refuse_foreign, takes_average, write_export
from fdfo_engine.models.export_styles import ExportStyle, refuse_style
from fdfo_engine.models.prompt_cache import PromptCache
from fdfo_engine.models.prompt_store import open_prompt_store
from fdfo_engine.models.registry import load_model
from fdfo_engine.planning.fit import gathers_rollout, plan_memory
from fdfo_engine.planning.kernels import as_saved, settled
from fdfo_engine.planning.memory import checkpoints_bytes
from fdfo_engine.rollout.backend import pair_backend
from fdfo_engine.rollout.blocks import JoinedBlocks, in_step, share
from fdfo_engine.rollout.generation import generate_share
from fdfo_engine.rollout.prompts import refuse_text
from fdfo_engine.rollout.sampler import PairedSampler, SampledBlock
from fdfo_engine.runtime import events
from fdfo_engine.runtime.closable import Closable
from fdfo_engine.runtime.distributed import (
    all_agree_hash,
    all_gather_rows,
    on_main,
    setup_distributed,
    together,
    world_size,
)
from fdfo_engine.runtime.durable import refuse_filled
from fdfo_engine.runtime.errors import Cancelled, CheckpointError, UsageError
from fdfo_engine.runtime.events import Listener
from fdfo_engine.runtime.host import host_kept
from fdfo_engine.runtime.progress import Progress
from fdfo_engine.runtime.run_checkpoints import RunCheckpoints
from fdfo_engine.runtime.run_folder import run_config
from fdfo_engine.trajectory import Rollout
from fdfo_engine.update.average import move_average
from fdfo_engine.update.networks import kl_reference, networks
from fdfo_engine.update.primitives import Primitives
from fdfo_engine.update.saving import Saving
from fdfo_engine.update.updater import Updater
from fdfo_engine.update.zero import ZeroTrainer

OnBlock = Callable[[Sequence[str], Tensor], None]


class Engine(Closable):
    """A flow model under FDFO training. On several ranks every method is collective and takes the same arguments.

    `close`, or the end of a `with` block, gives its memory back; after that it is of no use.

    Attributes:
        config: the resolved settings. model: the loaded `FlowModel`. trainer: its weights under ZeRO.
        base: where its base model lies, and what it is by content. backend: what runs the pair ops, by name.
        next_pair: the global index of the next pair; it never restarts within a run.
        ema: average of the trained weights by name, or None.
        memory: what an epoch is predicted to take of a GPU; None on a CPU. kernels: the backend of each op.
        checkpoints: those of `run.dir`, which `saving` writes. notes: JSON that each holds besides, for who drives it.
        primitives: the update in pieces, for a training loop of one's own.
        progress: tells what is being done, as events.
    """

    @host_kept()
    def __init__(self, config: Config, *, trains: bool = True, on_event: Listener | None = None) -> None:
        """Joins the ranks, loads the model and hands it to DeepSpeed; reads nothing of `run.dir` but its base's record.

        Args:
            config: the settings.
            trains: false plans no memory for an update, for an engine that only generates.
            on_event: called on rank 0 with each `Event`, by the thread that called the method which tells it. What it
                raises ends that method at that point and reaches its caller.

        Raises:
            ConfigError, UsageError: settings that don't fit the model or the ranks.
            EnvironmentProblem: the model cannot be loaded.
            CheckpointError: `run.dir` holds a run on another base model.
        """
        if config.run.deterministic:
            torch.use_deterministic_algorithms(True)
        self.config = config
        self.progress = Progress(on_event)
        self.device = setup_distributed("cuda" if torch.cuda.is_available() else "cpu", timeout_s=config.comm.timeout_s)
        all_agree_hash(dump_config(config), "the settings")
        self.backend = pair_backend(config, self.device)
        self.base = base_of_run(config)
        with self.progress.phase("loading", total=1, unit="models") as phase:
            phase.reach(0)
            self.model = load_model(config, self.device, self.base)
        self.memory = plan_memory(self.model, config) if trains and self.device.type == "cuda" else None
        micro_batch = config.update.micro_batch_items if self.memory is None else self.memory.micro_batch
        self.kernels = settled(config, self.model, micro_batch, self.backend, trains=trains)
        self.backend = self.kernels.pair_ops(self.backend)
        prompts = PromptCache(self.model, open_prompt_store(config, self.device, self.base))
        algorithm = build_algorithm(config, self.backend)
        self.sampler = PairedSampler(self.model, prompts, config, algorithm.plan, self.backend)
        reference = kl_reference(config, self.model)
        parameters = list(self.model.trained_parameters())
        self.trainer = ZeroTrainer(self.model.network, parameters, config.optimizer, config.zero)
        self._rollout_network, micro_batches = networks(config, self.trainer, [p for _, p in parameters], self.device)
        self._updater = Updater(
            self.model, self.trainer, micro_batches, reference, config, self.sampler.conditioning, algorithm
        )
        self._updater.micro_batch = micro_batch
        self.primitives = Primitives(self._updater, self.trainer, config.update.optimizer_steps, self.progress)
        self._block_pairs = BatchPlan.from_config(config, world_size()).block_pairs
        self.next_pair = 0
        self.notes: dict[str, Any] = {}
        self._epoch_version = 0
        self.checkpoints = RunCheckpoints(config, self.base.record, self.kernels.backends)
        self.saving = Saving(self.trainer, self.progress)
        self.ema = None if config.update.ema is None else self.trainer.weights()
        self.trainer.train(False)

    @property
    def epoch(self) -> int:
        """Updates done."""
        return self.progress.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.progress.epoch = epoch

    @property
    def poll(self) -> Callable[[], None]:
        """Called between blocks, micro-batches and batches, equally often on every rank; may raise to stop."""
        return self.progress.poll

    @poll.setter
    def poll(self, poll: Callable[[], None]) -> None:
        self.progress.poll = poll

    @property
    def micro_batch(self) -> int:
        """Items of one forward and backward: `update.micro_batch`, with auto decided here or by the checkpoint."""
        return self._updater.micro_batch

    @property
    def weights_version(self) -> int:
        """Optimiser steps applied so far."""
        return self.trainer.step_count

    @property
    def is_amid_epoch(self) -> bool:
        """Whether optimiser steps were taken since the last epoch's end: such weights are not saved."""
        return self.weights_version != self._epoch_version

    def _release(self) -> None:
        """Lets go of model and optimizer: hooks in C++ would hold them for the life of the process."""
        self.saving.carry_to_its_end()
        self.trainer.close()
        torch.cuda.empty_cache()

    def cancel(self, reason: str = "cancel was called") -> None:
        """Ends the call in progress, on every rank, with `Cancelled`; from any thread.

        `rollout`, `update`, `generate` and `forward_backward` end before their next block, micro-batch or batch; if
        none of them is in progress nothing happens. The engine stays usable. What an `update` leaves is said there.
        """
        self.progress.cancel(reason)

    def rollout(self, prompts: Sequence[str], on_block: OnBlock | None = None) -> Rollout:
        """Samples one pair a prompt, with the next global pair indices.

        Args:
            prompts: P texts.
            on_block: called after each of this rank's blocks with its prompts and images `[p, 2, 3, height, width]`,
                so that they can be scored while the next block is sampled; must not raise.

        Raises:
            UsageError: no prompts, or fewer blocks than ranks.
            CheckpointError: `run.dir` holds checkpoints that this engine did not load: `save` would refuse in the end.
            NumericsError: an embedding, a velocity or an image was not finite; names the part.
            Cancelled: `cancel` was called.
        """
        refuse_text(prompts)
        on_main(self.checkpoints.require_ours)
        first, count = self.next_pair, len(prompts)
        own = share(-(-count // self._block_pairs), "blocks of sampling.block_pairs pairs")
        local = list(range(own.start * self._block_pairs, min(own.stop * self._block_pairs, count)))
        self.sampler.warm([prompts[i] for i in local], self.progress)
        kept = JoinedBlocks(len(own))
        with self._gathered(), self.progress.phase("rollout", total=2 * count) as phase:
            for i, number in enumerate(in_step(own)):
                phase.reach(2 * min(i * world_size() * self._block_pairs, count))
                block = together(partial(self._block, prompts, number))
                if i < len(own):
                    kept.put(block, i)
                    if on_block is not None:
                        texts = prompts[number * self._block_pairs : (number + 1) * self._block_pairs]
                        on_block(texts, block.images[: len(texts)])
        self.next_pair += count
        return kept.rollout(
            self.sampler.plan, self.sampler.grid, [prompts[i] for i in local], [first + i for i in local],
            seed=self.config.run.seed,
            weights_version=self.weights_version, first_pair=first, num_pairs=count, block_pairs=self._block_pairs,
            backend=self.backend,
        )  # fmt: skip

    def update(self, rollout: Rollout, rewards: Tensor, *, allow_stale: bool = False) -> dict[str, float]:
        """One epoch's optimiser steps on `rollout`; returns metrics over all ranks.

        Args:
            rollout: from `rollout` of this engine or `Rollout.load`, on every rank its own part.
            rewards: float `[P, 2]` of all the rollout's pairs, the same on every rank; NaN in either branch is no
                opinion on that pair.
            allow_stale: train although the weights have changed since it was sampled, or although it was used before.

        Raises:
            UsageError: rewards of another shape; a rollout that was used, or that older weights sampled.
            NumericsError: ten optimiser steps in a row had a gradient that is not finite.
            Cancelled: `cancel` was called. Says how many optimiser steps were taken: after none the weights are as
                they were; after some they are of no epoch (`is_amid_epoch`), and `load` goes back.
        """
        rewards = torch.as_tensor(rewards, dtype=torch.float64).detach().cpu()
        if rewards.shape != (rollout.num_pairs, 2):
            raise UsageError(f"rewards: shape {tuple(rewards.shape)}; takes [{rollout.num_pairs}, 2]: pair, branch")
        if not allow_stale:
            rollout.require_fresh(self.weights_version)
        self.primitives.discard()
        try:
            with self.progress.phase("update", unit="micro-batches") as phase:
                metrics = self._updater.update(rollout, rewards, phase.reach)
        except Cancelled as error:
            raise Cancelled(f"{error}, {self._state_of_weights()}") from None
        rollout.used = True
        self.end_epoch()
        self.progress.tell(events.Metrics(epoch=self.epoch, kind="update", values=metrics))
        return metrics

    def end_epoch(self) -> None:
        """Counts an epoch and moves the average: after the last optimiser step of a loop on `primitives`.

        Gradients that no optimiser step has taken are dropped. Collective.
        """
        self.primitives.discard()
        self.epoch += 1
        self._epoch_version = self.weights_version
        if self.ema is not None and self.config.update.ema is not None:
            move_average(self.ema, self.trainer.weights(), self.config.update.ema)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        weights: Weights | Mapping[str, Tensor] = "auto",
        first: int = 0,
    ) -> Tensor:
        """Images `[N, 3, height, width]` in 0..1 by plain Euler without churn, the same on every rank.

        Image i depends on (seed, first + i, prompt, weights) only: a long list can be cut at multiples of
        `evaluation.batch` without changing a bit. `steps` and `guidance_scale` default to the sampling
        settings; `weights` "auto" takes the average where the run keeps one; or they are trained weights by name.

        Raises:
            UsageError: no prompts, or `weights="ema"` in a run without `update.ema`.
            NumericsError: an embedding, a velocity or an image was not finite; names the part.
            Cancelled: `cancel` was called.
        """
        refuse_text(prompts)
        self.sampler.tell_cut(prompts)
        grid = self.sampler.grid if steps is None else self.model.grid(steps)
        guidance = self.config.sampling.guidance_scale if guidance_scale is None else guidance_scale
        with self._using(weights), self._gathered(), self.progress.phase("generation", total=len(prompts)) as phase:
            own = generate_share(
                self.sampler, self.trainer, prompts, phase, batch=self.config.evaluation.batch, first=first, seed=seed,
                grid=grid, guidance=guidance,
            )  # fmt: skip
        return all_gather_rows(own)

    def trained_weights(self, weights: Weights = "auto") -> dict[str, Tensor]:
        """Float32 trained weights by parameter name, on the CPU."""
        average = self._average_for(weights)
        return self.trainer.weights() if average is None else average

    def save(self) -> Path:
        """Commits a checkpoint under `run.dir`, with the settings beside it for `resume`; returns its folder.

        Raises:
            UsageError: the folder holds a run with other settings; optimiser steps were taken since `end_epoch`.
            CheckpointError: it holds checkpoints that this engine neither loaded nor saved; no room; the storage
                refuses. Earlier checkpoints are untouched.
        """
        path = self.begin_save()
        self.saving.finish(wait=True)
        return path

    def begin_save(self) -> Path:
        """As `save`, but the copied values are written beside what follows: `saving.finish` says how that ended."""
        if self.is_amid_epoch:
            raise UsageError("save: optimiser steps were taken since the last epoch's end; end_epoch comes first")
        state = {
            "epoch": self.epoch, "next_pair": self.next_pair, "world_size": world_size(),
            "micro_batch": self.micro_batch, "notes": self.notes,
        }  # fmt: skip
        return self.saving.begin(self.checkpoints, self.ema, state)

    def load(self, name: str | None = None, *, strict: bool = False) -> bool:
        """Continues from checkpoint `name` of `run.dir`, or from the newest whole one; False if there is none.

        Raises:
            CheckpointError: damaged or foreign; a foreign one names what differs before anything is changed.
        """
        self.saving.finish(wait=True)
        checkpoint = together(lambda: self.checkpoints.load(name, strict=strict))
        all_agree_hash(checkpoint.name if checkpoint else "none", "the newest checkpoint")
        if checkpoint is None:
            return False
        together(lambda: refuse_foreign(checkpoint, self.config, self.model, self.base.record))
        self.kernels = as_saved(self.kernels, checkpoint.state, self.model.network)
        self.trainer.load(checkpoint.tensors["weights"], checkpoint.tensors["optimizer"])
        self.epoch = int(checkpoint.state["epoch"])
        self.next_pair = int(checkpoint.state["next_pair"])
        self.notes = dict(checkpoint.state.get("notes") or {})
        self.primitives.discard()
        self._epoch_version = self.weights_version
        # rounding depends on its size: a resume takes what the run began with
        self._updater.micro_batch = int(checkpoint.state.get("micro_batch", self.micro_batch))
        if self.ema is not None:
            self.ema = checkpoint.tensors["ema"]
        self.checkpoints.are_ours = True
        return True

    @classmethod
    def resume(
        cls, run_dir: str | Path, name: str | None = None, *, trains: bool = True, base: str | Path | None = None
    ) -> Engine:
        """The engine of the run in `run_dir`, at its newest checkpoint or at `name`; `trains` as of the constructor.

        `base` is where its base model lies now, if not at `model.id`.

        Raises:
            CheckpointError: no run there, no whole checkpoint, or another base model than the run began with.
            ConfigError: its `config.yaml` was edited into something that is not valid.
        """
        engine = cls(run_config(run_dir, base), trains=trains)
        if not engine.load(name):
            raise CheckpointError(f"{run_dir}: no checkpoint in {engine.checkpoints.folder}")
        return engine

    def export(
        self, folder: str | Path, *, weights: Weights = "auto", overwrite: bool = False,
        style: ExportStyle = "diffusers",
    ) -> Path:  # fmt: skip
        """A LoRA for `load_lora_weights`, or after full training a pipeline folder; verified by loading it back.

        Style comfyui writes the LoRA in the names of the model's original code (`models/native_lora.py`), merged a
        pipeline folder with the LoRA in its weights. A model card (README.md) lies beside each.

        Raises:
            UsageError: `folder` is not empty, without `overwrite`, which writes over the files of these names;
                a style that these weights cannot have.
            CheckpointError: loaded back, it does not give the same velocity.
        """
        refuse_filled(Path(folder), overwrite)
        refuse_style(style, self.config.model)
        trained = self.trained_weights(weights)
        fresh = partial(load_model, self.config, self.device, self.base)  # at ZeRO-3 the live one holds only pieces
        on_main(lambda: write_export(fresh(), self.config, self.base.record, self.epoch, Path(folder), trained, style))
        return Path(folder)

    def _block(self, prompts: Sequence[str], number: int) -> SampledBlock:
        size, last = self._block_pairs, len(prompts) - 1
        rows = range(number * size, (number + 1) * size)
        ids = [self.next_pair + row for row in rows]
        return self.sampler.sample_block(self._rollout_network, [prompts[min(row, last)] for row in rows], ids)

    def _state_of_weights(self) -> str:
        steps = self.weights_version - self._epoch_version
        if not steps:
            return "the weights are as they were"
        return f"after {steps} optimiser steps of epoch {self.epoch + 1}: Engine.load goes back to a checkpoint"

    def _average_for(self, weights: Weights) -> dict[str, Tensor] | None:
        return self.ema if takes_average(weights, keeps=self.ema is not None) else None

    def _gathered(self) -> AbstractContextManager[None]:
        keeps = gathers_rollout(self.config, self.trainer.weight_bytes, self.device)
        return self.trainer.whole_weights() if keeps else nullcontext()

    def _using(self, weights: Weights | Mapping[str, Tensor]) -> AbstractContextManager[None]:
        instead = dict(weights) if isinstance(weights, Mapping) else self._average_for(weights)
        return nullcontext() if instead is None else self.trainer.weights_swapped(instead)

    @property
    def checkpoints_bytes(self) -> int:
        """What the checkpoints of this run take of the disk; see `planning.memory.checkpoints_bytes`."""
        return checkpoints_bytes(self.trainer.num_values, self.config)
