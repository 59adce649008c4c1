"""Batch arithmetic: how the pairs of an epoch become blocks, ranks' shares, optimizer steps and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from fdfo_engine.config.cross_checks import trained_steps
from fdfo_engine.config.problems import ConfigError
from fdfo_engine.config.schema import Config

MAX_AUTO_BLOCK = 12
"""Largest block that `sampling.block_pairs: auto` picks; it never depends on the number of ranks."""


def auto_block_pairs(pairs_per_epoch: int) -> int:
    """The largest divisor of `pairs_per_epoch` that is at most 12."""
    return next(size for size in range(MAX_AUTO_BLOCK, 0, -1) if pairs_per_epoch % size == 0)


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of an epoch on `world_size` ranks. Only the assignment of blocks depends on the ranks."""

    world_size: int
    pairs_per_epoch: int
    block_pairs: int
    num_blocks: int
    steps: int
    trained_steps: int
    optimizer_steps: int
    items_per_optimizer_step: int
    """B of METHOD: (sample, step) items dealt to one optimizer step, over all ranks."""
    micro_batch: int
    sampling_evaluations: int
    """Runs of the model on one image at one step, in a rollout."""
    training_evaluations: int
    """The same in an update, if no pair ties; each but those of the KL term's base model has a backward pass."""

    @classmethod
    def from_config(cls, config: Config, world_size: int) -> BatchPlan:
        """The plan of a run.

        Raises:
            ConfigError: there are fewer blocks than ranks; names the nearest legal settings.
        """
        if world_size < 1:
            raise ValueError(f"world_size = {world_size}: takes a whole number >= 1")
        sampling, update = config.sampling, config.update
        pairs, is_auto = sampling.pairs_per_epoch, sampling.block_pairs == "auto"
        block = auto_block_pairs(pairs) if sampling.block_pairs == "auto" else sampling.block_pairs
        num_blocks = -(-pairs // block)
        if num_blocks < world_size:
            raise ConfigError([_too_few_blocks(pairs, block, world_size, is_auto=is_auto)])
        trained = trained_steps(config)
        looks_again = trained if config.algorithm.renoises else 0
        passes = 1 if sampling.guidance_scale == 1.0 else 2
        networks = 2 if update.needs_base else 1
        return cls(
            world_size=world_size,
            pairs_per_epoch=pairs,
            block_pairs=block,
            num_blocks=num_blocks,
            steps=sampling.steps,
            trained_steps=trained,
            optimizer_steps=update.optimizer_steps,
            items_per_optimizer_step=2 * pairs * trained // update.optimizer_steps,
            micro_batch=update.micro_batch_items,
            sampling_evaluations=2 * pairs * (sampling.steps + looks_again) * passes,
            training_evaluations=2 * pairs * trained * passes * networks,
        )

    @property
    def images_per_epoch(self) -> int:
        """Two a pair."""
        return 2 * self.pairs_per_epoch

    @property
    def evaluations_per_epoch(self) -> int:
        """Model evaluations of rollout and update together."""
        return self.sampling_evaluations + self.training_evaluations

    def blocks_of_rank(self, rank: int) -> range:
        """The blocks of a rank: contiguous, none left out, sizes at most one apart."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank = {rank}: takes 0 to {self.world_size - 1}")
        return range(rank * self.num_blocks // self.world_size, (rank + 1) * self.num_blocks // self.world_size)

    def describe(self) -> str:
        """The arithmetic with its numbers, for `--dry-run`."""
        shares = sorted({len(self.blocks_of_rank(rank)) for rank in range(self.world_size)})
        last = self.pairs_per_epoch - (self.num_blocks - 1) * self.block_pairs
        short = "" if last == self.block_pairs else f", the last one of {last}"
        items, micro = self.items_per_optimizer_step, self.micro_batch
        return "\n".join(
            [
                f"an epoch: {self.pairs_per_epoch} pairs = {self.images_per_epoch} images, {self.steps} steps each",
                f"blocks: {self.num_blocks} of {self.block_pairs} pairs{short}; "
                f"{' or '.join(map(str, shares))} a rank on {counted(self.world_size, 'rank')}",
                f"optimizer steps: {self.optimizer_steps} of {items} items "
                f"= 2 * {self.pairs_per_epoch} pairs * {self.trained_steps} trained steps / {self.optimizer_steps}",
                f"micro-batches: {micro} items, about {-(-items // (self.world_size * micro))} a rank and step",
                f"model evaluations an epoch: {self.sampling_evaluations} sampling + "
                f"{self.training_evaluations} training = {self.evaluations_per_epoch}",
            ]
        )


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _too_few_blocks(pairs: int, block: int, ranks: int, *, is_auto: bool) -> str:
    chosen = "auto = " if is_auto else ""
    equation = (
        f"sampling.pairs_per_epoch = {pairs} in blocks of sampling.block_pairs = {chosen}{block} makes "
        f"ceil({pairs} / {block}) = {counted(-(-pairs // block), 'block')} for {ranks} ranks; each needs one"
    )
    fixes = []
    if pairs >= ranks:
        fixes.append(f"sampling.block_pairs = {-(-pairs // (ranks - 1)) - 1} or less")
    fixes.append(f"sampling.pairs_per_epoch = {_nearest_pairs(pairs, block, ranks, is_auto=is_auto)}")
    return f"{equation}. Nearest that work: {', or '.join(fixes)}, or at most {-(-pairs // block)} ranks"


def _nearest_pairs(pairs: int, block: int, ranks: int, *, is_auto: bool) -> int:
    """The next larger `pairs_per_epoch` that fills its blocks and gives every rank one."""
    if not is_auto:
        return block * ranks
    return next(p for p in range(pairs + 1, MAX_AUTO_BLOCK * ranks + 1) if p // auto_block_pairs(p) >= ranks)
