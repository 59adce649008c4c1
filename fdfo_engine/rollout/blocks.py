"""How blocks of pairs, and batches of images, are shared over ranks, and how the blocks of a rank are joined."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fdfo_engine.models.flow_model import Grid
from fdfo_engine.ops import pair_direction
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.rollout.sampler import SampledBlock
from fdfo_engine.runtime.distributed import max_over_ranks, rank, world_size
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.trajectory import Rollout


def share(count: int, what: str, *, may_idle: bool = False) -> range:
    """This rank's contiguous share of `count` units.

    Raises:
        UsageError: no unit at all, or without `may_idle` fewer than ranks.
    """
    ranks = world_size()
    if count == 0:
        raise UsageError("prompts: an empty list; takes at least one prompt")
    if count < ranks and not may_idle:
        raise UsageError(f"prompts: {count} {what} for {ranks} ranks; takes at least one a rank")
    return range(rank() * count // ranks, (rank() + 1) * count // ranks)


def in_step(own: range) -> list[int]:
    """`own`, its last repeated to the longest share of a rank: at ZeRO-3 all call the network together. Collective."""
    spare = own[-1] if own else 0
    return list(own) + [spare] * (max_over_ranks(len(own)) - len(own))


class JoinedBlocks:
    """The blocks of one rank, copied to their rows one by one: joining at the end would hold every trajectory twice."""

    def __init__(self, count: int) -> None:
        """`count` blocks will come."""
        self._count = count
        self._rows: dict[str, Tensor] = {}

    def put(self, block: SampledBlock, number: int) -> None:
        """Takes block `number`, counted from 0."""
        for name, part in vars(block).items():
            size = len(part)
            if name not in self._rows:
                self._rows[name] = part.new_empty(self._count * size, *part.shape[1:])
            self._rows[name][number * size : (number + 1) * size] = part

    def rollout(
        self, plan: SamplingPlan, grid: Grid, prompts: list[str], pair_ids: list[int], *, backend: str, **about: Any
    ) -> Rollout:
        """All that came, without the padding behind `prompts`; `about` are the other fields of `Rollout`."""
        joined = {name: rows[: len(prompts)] for name, rows in self._rows.items()}
        return Rollout(
            images=joined["images"],
            prompts=prompts,
            pair_ids=pair_ids,
            velocities=joined["velocities"],
            direction=pair_direction(joined["latents"], backend=backend),
            distance=_distance(joined["latents"]),
            gammas=joined["gammas"],
            sigmas=grid.sigmas,
            timesteps=grid.timesteps,
            solver=plan.solver,
            finals=None if plan.renoised_steps is None else joined["latents"],
            backend=backend,
            **about,
        )


def _distance(latents: Tensor) -> Tensor:
    """Root mean square of half the difference of the branches, of `[P, 2, *shape]`: float32 `[P]` on the CPU."""
    half = (latents[:, 0] - latents[:, 1]) / 2
    return half.square().flatten(1).mean(1).sqrt().cpu()
