"""How much of a GPU an epoch takes on one rank, by arithmetic from counted sizes, and which micro-batch fits."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fdfo_engine.config import BatchPlan, Config
from fdfo_engine.config.schema import AUTO_MICRO_BATCH
from fdfo_engine.planning.footprint import Footprint
from fdfo_engine.rollout.sampler import DECODE_IMAGES
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.update.zero import BUCKET_VALUES, MAX_LIVE_VALUES

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
            f"memory: {_gib(self.peak)} at the peak, micro-batch {self.micro_batch}, {self.ranks} ranks; "
            f"{_gib(self.needed)} must be free, with slack"
        ]
        for phase, parts in phases.items():
            if not any(parts.values()):
                continue
            shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
            lines.append(f"  {phase}: {_gib(sum(parts.values()))} ({shown})")
        return "\n".join(lines)


def predict(footprint: Footprint, config: Config, plan: BatchPlan, scorers: int = 0) -> Prediction:
    """The memory of an epoch as `plan` cuts it (its ranks and micro-batch), with `scorers` bytes of reward models."""
    sharded = plan.world_size if config.zero.stage == 3 else 1
    pairs = min(len(plan.blocks_of_rank(plan.world_size - 1)) * plan.block_pairs, plan.pairs_per_epoch)
    guided = 1 if config.sampling.guidance_scale == 1.0 else 2
    trajectory = 2 * pairs * plan.steps * footprint.velocity
    images = 2 * pairs * footprint.image
    block = 2 * plan.block_pairs
    optimizer, weights = _optimizer_bytes(footprint, config.zero.stage, plan.world_size), _weights(footprint, sharded)
    host = {"optimizer": optimizer if config.zero.offload_optimizer else 0}
    host |= weights if config.zero.offload_parameters else {}
    resident = dict.fromkeys(weights, 0) if config.zero.offload_parameters else dict(weights)
    resident |= {
        "optimizer": 0 if config.zero.offload_optimizer else optimizer,
        "VAE": footprint.other,
        "reward models": scorers,
        "frozen copy": 0 if config.update.kl_reference is None else footprint.frozen + footprint.trained,
    }
    gathers = sharded > 1 or config.zero.offload_parameters
    gathered = _gathered_bytes(footprint) if gathers else 0
    kept = {"trajectories": trajectory, "images": images}
    rollout = kept | {"gathered weights": gathered}
    rollout["block"] = block * (plan.steps * footprint.velocity + footprint.image)
    forward, decode = footprint.forward.at(guided * block), footprint.decode.at(DECODE_IMAGES)
    if config.model.cuda_graphs:  # a graph keeps what it was captured with
        resident["rollout graph"] = forward
        resident["training graphs"] = footprint.training.at(guided * plan.micro_batch)
    rollout["network or VAE"] = decode if config.model.cuda_graphs else max(forward, decode)
    update = kept | {"gathered weights": gathered}
    beside = plan.micro_batch - 1 if config.model.cuda_graphs else plan.micro_batch  # graphs take whole ones
    update["micro-batch"] = footprint.training.at(guided * beside)
    update["gradient exchange"] = _exchange_bytes(footprint, config.zero.stage)
    if config.update.kl_weight:
        update["base model"] = footprint.forward.at(guided * plan.micro_batch)
    # the network is loaded whole, and split or offloaded from there
    unsplit = footprint.frozen + footprint.trained - sum(resident[name] for name in weights)
    return Prediction(
        resident=resident, loading={"whole weights": unsplit}, prompts={"text encoders": footprint.text},
        evaluation=_evaluation(footprint, config, guided, gathered), rollout=rollout, update=update, host=host,
        micro_batch=plan.micro_batch, ranks=plan.world_size,
    )  # fmt: skip


def _evaluation(footprint: Footprint, config: Config, guided: int, gathered: int) -> dict[str, int]:
    if not config.evaluation.every:
        return {}
    forward = footprint.forward.at(guided * config.evaluation.batch)
    return {
        "network or VAE": max(forward, footprint.decode.at(DECODE_IMAGES)),
        "gathered weights": gathered,
        "weights that the average replaces": footprint.trained if config.update.ema is not None else 0,
    }


def _weights(footprint: Footprint, sharded: int) -> dict[str, int]:
    return {"frozen weights": footprint.frozen // sharded, "trained weights": footprint.trained // sharded}


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


def refusal(prediction: Prediction, free: int) -> str:
    """That it does not fit, and what to change."""
    return (
        f"memory: an epoch needs {_gib(prediction.needed)} on a GPU with {_gib(free)} free; lower "
        "sampling.block_pairs, update.micro_batch or evaluation.batch, set model.gradient_checkpointing: true, "
        "raise zero.stage, or take more ranks"
    )


def _optimizer_bytes(footprint: Footprint, stage: int, ranks: int) -> int:
    """Moments and, from stage 1 on, a float32 master and its gradient, all split over the ranks."""
    values = footprint.trained_values
    return 8 * values if stage == 0 else 16 * math.ceil(values / ranks)


def _exchange_bytes(footprint: Footprint, stage: int) -> int:
    return 0 if stage == 0 else 4 * min(BUCKET_VALUES, footprint.trained_values)


def _gathered_bytes(footprint: Footprint) -> int:
    """ZeRO-3 gathers weights for use; 2 bytes each but for float32 ones."""
    return min(footprint.frozen + footprint.trained, 2 * MAX_LIVE_VALUES)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
