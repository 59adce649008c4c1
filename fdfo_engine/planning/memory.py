"""How much of a GPU an epoch takes on one rank, by arithmetic from counted sizes, and which micro-batch fits."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fdfo_engine.config import BatchPlan, Config
from fdfo_engine.config.batch import counted
from fdfo_engine.config.schema import AUTO_MICRO_BATCH
from fdfo_engine.planning.footprint import Footprint
from fdfo_engine.rollout.sampler import DECODE_IMAGES
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.update.deepspeed_settings import BUCKET_VALUES, MAX_LIVE_VALUES

GIB = 1 << 30
MICRO_BATCHES = (AUTO_MICRO_BATCH, 12, 8, 6, 4, 3, 2, 1)
"""What `update.micro_batch: auto` chooses from: a little more or less free memory then rarely changes the choice, and
above the first of them a GPU gains under 2%."""

SLACK = 1.08
"""Over the counted bytes: fragments of the allocator, and workspaces of libraries."""

CONTEXT_BYTES = GIB // 2
"""The libraries' own, outside the allocator."""


@dataclass(frozen=True)
class Prediction:
    """Bytes on the fullest rank by what they are for: always there, and besides in each phase; and in host memory."""

    resident: dict[str, int]
    loading: dict[str, int]
    prompts: dict[str, int]
    evaluation: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    host: dict[str, int]
    micro_batch: int
    ranks: int

    @property
    def peak(self) -> int:
        """The largest of the phases, with what is always there."""
        return sum(self.resident.values()) + max(sum(parts.values()) for parts in self.phases.values())

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        """What comes after another, by name."""
        return {name: getattr(self, name) for name in ("loading", "prompts", "evaluation", "rollout", "update")}

    @property
    def needed(self) -> int:
        """What a GPU must have free: the peak, slack, and the libraries' own."""
        return math.ceil(SLACK * self.peak) + CONTEXT_BYTES

    def describe(self) -> str:
        """The sum with its numbers."""
        phases = {"always": self.resident, **self.phases, "host": self.host}
        lines = [
            f"memory: {in_gib(self.peak)} at the peak, micro-batch {self.micro_batch}, {counted(self.ranks, 'rank')}; "
            f"{in_gib(self.needed)} must be free, with slack"
        ]
        for phase, parts in phases.items():
            if not any(parts.values()):
                continue
            shown = ", ".join(f"{name} {in_gib(size)}" for name, size in parts.items() if size)
            lines.append(f"  {phase}: {in_gib(sum(parts.values()))} ({shown})")
        return "\n".join(lines)


def predict(footprint: Footprint, config: Config, plan: BatchPlan, scorers: int = 0) -> Prediction:
    """The memory of an epoch as `plan` cuts it (its ranks and micro-batch), with `scorers` bytes of reward models."""
    epoch = _Epoch(footprint, config, plan)
    resident = epoch.resident() | {"reward models": scorers}
    # the network is loaded whole, and split or offloaded from there
    unsplit = footprint.frozen + footprint.trained - sum(resident[name] for name in epoch.weights)
    return Prediction(
        resident=resident,
        loading={"whole weights": unsplit},
        prompts={"text encoders": footprint.text},
        evaluation=epoch.evaluation(),
        rollout=epoch.rollout(),
        update=epoch.update(),
        host=epoch.host(),
        micro_batch=plan.micro_batch,
        ranks=plan.world_size,
    )


@dataclass(frozen=True)
class _Epoch:
    """Bytes of one phase after the other, by what they are for."""

    footprint: Footprint
    config: Config
    plan: BatchPlan

    @property
    def guided(self) -> int:
        """Rows of a batch for an image: guidance takes one without the prompt, too."""
        return 1 if self.config.sampling.guidance_scale == 1.0 else 2

    @property
    def weights(self) -> dict[str, int]:
        """A rank's share of the network."""
        shares = self.plan.world_size if self.config.zero.stage == 3 else 1
        return {"frozen weights": self.footprint.frozen // shares, "trained weights": self.footprint.trained // shares}

    @property
    def optimizer(self) -> int:
        """Moments and, from stage 1 on, a float32 master and its gradient, all split over the ranks."""
        values = self.footprint.trained_values
        return 8 * values if self.config.zero.stage == 0 else 16 * math.ceil(values / self.plan.world_size)

    @property
    def gathered(self) -> dict[str, int]:
        """Weights that are brought whole for their use; 2 bytes each but for float32 ones."""
        is_split = self.config.zero.stage == 3 and self.plan.world_size > 1
        if not (is_split or self.config.zero.offload_parameters):
            return {"gathered weights": 0}
        whole = self.footprint.frozen + self.footprint.trained
        return {"gathered weights": min(whole, 2 * MAX_LIVE_VALUES)}

    @property
    def kept(self) -> dict[str, int]:
        """What a rollout leaves for the update, on the rank with most blocks."""
        plan = self.plan
        pairs = min(len(plan.blocks_of_rank(plan.world_size - 1)) * plan.block_pairs, plan.pairs_per_epoch)
        return {
            "trajectories": 2 * pairs * (plan.steps + self.finals) * self.footprint.velocity,
            "images": 2 * pairs * self.footprint.image,
        }

    @property
    def finals(self) -> int:
        """Final latents that are kept, float32, in velocities of 16 bits; of float32 ones it is too many by one."""
        return 2 if self.config.algorithm.renoises else 0

    @property
    def block_forward(self) -> int:
        """The network over one block of a rollout."""
        return self.footprint.forward.at(self.guided * 2 * self.plan.block_pairs)

    def resident(self) -> dict[str, int]:
        """Always there, whatever the phase."""
        footprint, zero = self.footprint, self.config.zero
        always = dict.fromkeys(self.weights, 0) if zero.offload_parameters else self.weights
        always |= {
            "optimizer": 0 if zero.offload_optimizer else self.optimizer,
            "VAE": footprint.other,
            "frozen copy": 0 if self.config.update.kl_reference is None else footprint.frozen + footprint.trained,
        }
        if self.config.model.cuda_graphs:  # a graph keeps what it was captured with
            always["rollout graph"] = self.block_forward
            always["training graphs"] = footprint.training.at(self.guided * self.plan.micro_batch)
        return always

    def host(self) -> dict[str, int]:
        """In host memory."""
        zero = self.config.zero
        moved = {"optimizer": self.optimizer if zero.offload_optimizer else 0}
        return moved | (self.weights if zero.offload_parameters else {})

    def rollout(self) -> dict[str, int]:
        """Beside what is resident, while a block is sampled or decoded."""
        block = 2 * self.plan.block_pairs * (self.plan.steps * self.footprint.velocity + self.footprint.image)
        decode = self.footprint.decode.at(DECODE_IMAGES)
        largest = decode if self.config.model.cuda_graphs else max(self.block_forward, decode)
        return self.kept | self.gathered | {"block": block, "network or VAE": largest}

    def update(self) -> dict[str, int]:
        """Beside what is resident, in a micro-batch."""
        micro_batch, footprint = self.plan.micro_batch, self.footprint
        beside = micro_batch - 1 if self.config.model.cuda_graphs else micro_batch  # graphs take whole ones
        phase = self.kept | self.gathered | {"micro-batch": footprint.training.at(self.guided * beside)}
        exchanged = 0 if self.config.zero.stage == 0 else min(BUCKET_VALUES, footprint.trained_values)
        phase["gradient exchange"] = 4 * exchanged
        if self.config.update.needs_base:
            phase["base model"] = footprint.forward.at(self.guided * micro_batch)
        return phase

    def evaluation(self) -> dict[str, int]:
        """Beside what is resident, in an evaluation."""
        if not self.config.evaluation.every:
            return {}
        forward = self.footprint.forward.at(self.guided * self.config.evaluation.batch)
        replaced = self.footprint.trained if self.config.update.ema is not None else 0
        largest = max(forward, self.footprint.decode.at(DECODE_IMAGES))
        return {"network or VAE": largest, **self.gathered, "weights that the average replaces": replaced}


def choose_micro_batch(footprint: Footprint, config: Config, ranks: int, free: int, scorers: int = 0) -> Prediction:
    """What fits `free` bytes, for `update.micro_batch: auto` the largest of `MICRO_BATCHES`; a given number stays.

    Rounding depends on the micro-batch, so it must not depend on the ranks: it is chosen as if one rank held all
    trajectories and state. Only where not even one item fits that way does the real number of ranks decide.

    Raises:
        UsageError: nothing fits; names the keys to change.
    """
    plan = BatchPlan.from_config(config, ranks)
    if config.update.micro_batch != "auto":
        return predict(footprint, config, plan, scorers)
    for decisive in (dataclasses.replace(plan, world_size=1), plan):
        for size in MICRO_BATCHES:
            if predict(footprint, config, dataclasses.replace(decisive, micro_batch=size), scorers).needed <= free:
                return predict(footprint, config, dataclasses.replace(plan, micro_batch=size), scorers)
    least = predict(footprint, config, dataclasses.replace(plan, micro_batch=1), scorers)
    raise UsageError(f"{refusal(least, free)}\n{least.describe()}")


def checkpoints_bytes(trained_values: int, config: Config) -> int:
    """What the checkpoints of a run take of the disk: each has weights, both moments and the average, all float32.

    Counted are the newest, the best and the one that a guard goes back to, and the one that is written before the
    oldest goes.
    """
    each = 4 * trained_values * (3 if config.update.ema is None else 4)
    beside = 2 if config.evaluation.guard.action == "rollback" else 1
    return (config.checkpoint.keep + beside + 1) * each


def refusal(prediction: Prediction, free: int) -> str:
    """That it does not fit, and what to change."""
    return (
        f"memory: an epoch needs {in_gib(prediction.needed)} on a GPU with {in_gib(free)} free; lower "
        "sampling.block_pairs, update.micro_batch or evaluation.batch, set model.gradient_checkpointing: true, "
        "raise zero.stage, or take more ranks"
    )


def in_gib(size: int) -> str:
    """`size` bytes, for a person."""
    return f"{size / GIB:.2f} GiB"
