"""What a rollout leaves for the update: pairs, their images, and one velocity a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fdfo_engine.ops import Solver, moved, replay
from fdfo_engine.runtime.distributed import gather_rows, rank, world_size
from fdfo_engine.runtime.durable import open_to_readers, sealed_json, sha256_of, unsealed_json
from fdfo_engine.runtime.errors import CheckpointError, UsageError
from fdfo_engine.trajectory.renoised import Renoising

_ON_DEVICE = ("images", "velocities", "direction", "finals")
_SEAL = "record_sha256"
_TENSORS = (*_ON_DEVICE, "distance", "gammas", "sigmas", "timesteps")


@dataclass
class Rollout:
    """Paired trajectories of this rank. Latents between steps are not kept: they are replayed from the velocities.

    Attributes:
        images: float32 `[P, 2, 3, height, width]` in 0..1.
        prompts: P texts, one a pair.
        pair_ids: P global pair indices.
        velocities: `[P, 2, T, C, H, W]` in the model's dtype: guided, as the steps used them.
        direction: u of branch 0, float32 `[P, C, H, W]`; branch 1 has its negative.
        distance: float32 `[P]` on the CPU: how far apart the two latents ended, rms of half their difference.
        gammas: float64 `[P, T + 1]`, the fresh noise at every grid point: churn, or what `solver` takes them for.
        sigmas, timesteps: the grid, float32 `[T + 1]` and `[T]`.
        seed: of the noise. weights_version: optimiser steps taken when it was sampled.
        first_pair, num_pairs: the global range of pairs this rollout is a part of; block_pairs: sampled together.
        backend: that sampled it; replay is bit for bit on the same one. used: whether it was trained on.
        kept: indices of the pairs that are left of the range, ascending, on every rank the same; None means all.
        trained_version: optimiser steps taken when one last trained on it, None before the first.
        solver: of the trajectories; see `ops.paired_step`.
        finals: final latents, float32 `[P, 2, C, H, W]`, where items are these noised again and `velocities` the
            model's there; None where items are the trajectories' own states.
    """

    images: Tensor
    prompts: list[str]
    pair_ids: list[int]
    velocities: Tensor
    direction: Tensor
    distance: Tensor
    gammas: Tensor
    sigmas: Tensor
    timesteps: Tensor
    seed: int
    weights_version: int
    first_pair: int
    num_pairs: int
    block_pairs: int
    backend: str
    used: bool = False
    kept: list[int] | None = None
    trained_version: int | None = None
    solver: Solver = "churn"
    finals: Tensor | None = None

    def __repr__(self) -> str:
        """Short: a notebook shows it after each call."""
        height, width = self.images.shape[-2:]
        pairs = f"{len(self.prompts)} pairs" + (f" of {self.num_pairs}" if len(self.prompts) != self.num_pairs else "")
        state = f"after {self.weights_version} optimiser steps" + (", used" if self.used else "")
        return f"Rollout({pairs}, {self.steps} steps, {height} x {width}, {state})"

    @property
    def steps(self) -> int:
        """Number of solver steps T."""
        return self.velocities.shape[2]

    @property
    def local_rows(self) -> Tensor:
        """Rows of a global `[num_pairs, ...]` tensor that are this rank's, int64 `[P]`."""
        if self.kept is None:
            return self._places
        return torch.searchsorted(torch.tensor(self.kept, dtype=torch.int64), torch.tensor(self.pair_ids))

    @property
    def blocks(self) -> Tensor:
        """The block each pair was sampled in, int64 `[P]`, ascending."""
        return self._places // self.block_pairs

    @property
    def _places(self) -> Tensor:
        """Where this rank's pairs stand in the range that was sampled, int64 `[P]`."""
        return torch.tensor(self.pair_ids, dtype=torch.int64) - self.first_pair

    def latents(self, pair: Tensor, branch: Tensor, step: Tensor) -> Tensor:
        """x at `step` of each item, float32 `[B, C, H, W]`; indices are int64 `[B]`, `pair` a row of this rollout."""
        if self.finals is not None:
            return self.renoising.latents(self.finals_at(pair, branch), self.ids_of(pair), branch, step)
        return replay(
            self.velocities, pair_ids=self.pair_ids, pair=pair, branch=branch, step=step,
            sigmas=self.sigmas, gammas=self.gammas, seed=self.seed, solver=self.solver,
            backend=self.backend,
        )  # fmt: skip

    def velocities_at(self, pair: Tensor, branch: Tensor, step: Tensor) -> Tensor:
        """The velocity that sampling used at each item, `[B, C, H, W]`; indices as of `latents`."""
        place = moved(torch.stack([pair, branch, step]), self.velocities.device)
        return self.velocities[tuple(place)]

    def finals_at(self, pair: Tensor, branch: Tensor) -> Tensor:
        """The final latent of each item where they are kept, float32 `[B, C, H, W]`; indices as of `latents`."""
        assert self.finals is not None, "the plan keeps them"
        return self.finals[tuple(moved(torch.stack([pair, branch]), self.finals.device))]

    @property
    def renoising(self) -> Renoising:
        """How items become of `finals`."""
        return Renoising(self.sigmas, self.seed, self.backend)

    def ids_of(self, pair: Tensor) -> Tensor:
        """Global indices of the rows `pair`, int64 `[B]`."""
        return torch.tensor(self.pair_ids, dtype=torch.int64)[pair]

    def require_fresh(self, weights_version: int) -> None:
        """Raises UsageError where it was trained on already, or where other rollouts have moved the weights since."""
        if self.used:
            raise UsageError("rollout: was trained on already; sample a new one, or pass allow_stale=True")
        if weights_version not in (self.weights_version, self.trained_version):
            raise UsageError(
                f"rollout: sampled after {self.weights_version} optimiser steps, the weights are now at "
                f"{weights_version}; sample a new one, or pass allow_stale=True"
            )

    def keep(self, pair_ids: Sequence[int]) -> Rollout:
        """The rollout with these pairs alone: the others do not count in the update, not even as ties.

        Args:
            pair_ids: global indices of what to keep, of all ranks' pairs, the same on every rank.

        Raises:
            UsageError: none, or a pair that the rollout does not have.
        """
        kept = sorted(set(pair_ids))
        before = self.kept or range(self.first_pair, self.first_pair + self.num_pairs)
        if not kept or (foreign := sorted(set(kept) - set(before))):
            raise UsageError(f"rollout.keep: pair_ids are {f'not of it: {foreign[:5]}' if kept else 'empty'}")
        wanted = set(kept)
        rows = [row for row, pair in enumerate(self.pair_ids) if pair in wanted]
        return dataclasses.replace(
            self,
            images=self.images[rows],
            prompts=[self.prompts[row] for row in rows],
            pair_ids=[self.pair_ids[row] for row in rows],
            velocities=self.velocities[rows],
            direction=self.direction[rows],
            distance=self.distance[rows],
            gammas=self.gammas[rows],
            finals=None if self.finals is None else self.finals[rows],
            num_pairs=len(kept),
            kept=kept,
        )

    def gather_images(self) -> Tensor | None:
        """Images of all pairs, `[num_pairs, 2, 3, height, width]`, on rank 0; None on the others. Collective."""
        return gather_rows(self.images)

    def save(self, folder: str | Path) -> None:
        """Writes this rank's part under `folder` as safetensors and JSON: it can be scored and trained on later."""
        folder, stem = Path(folder), f"rollout_{rank():05d}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name) for name in _TENSORS}
        there = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        file = folder / f"{stem}.safetensors"
        save_file(there, file)
        open_to_readers(folder)
        record = {
            "fields": {name: value for name, value in vars(self).items() if name not in _TENSORS},
            "world_size": world_size(),
            "tensors_sha256": sha256_of(file),
        }
        (folder / f"{stem}.json").write_bytes(sealed_json(record, _SEAL))

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str | None = None) -> Rollout:
        """Reads what `save` wrote, this rank's part of it, to `device`: by default this rank's GPU where there is one.

        Raises:
            CheckpointError: `folder` holds no rollout, a damaged one, one of another version, or one of another number
                of ranks.
        """
        folder, stem = Path(folder), f"rollout_{rank():05d}"
        if not (folder / f"{stem}.json").is_file():
            raise CheckpointError(f"{folder}: no {stem}.json; Rollout.save writes one")
        fields = _verified_fields(folder, stem)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with safe_open(folder / f"{stem}.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        tensors |= {name: tensors[name].to(device) for name in _ON_DEVICE if name in tensors}
        return cls(**tensors, **fields)


def _verified_fields(folder: Path, stem: str) -> dict[str, Any]:
    """The fields of a rollout beside its tensors, where both files are as they were written.

    Raises:
        CheckpointError: as `Rollout.load`.
    """
    try:
        record = unsealed_json(folder / f"{stem}.json", _SEAL)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if record["world_size"] != world_size():
        raise CheckpointError(f"{folder}: a rollout of {record['world_size']} ranks, loaded on {world_size()}")
    fields: dict[str, Any] = record["fields"]
    own = {field.name for field in dataclasses.fields(Rollout)} - set(_TENSORS)
    if differing := sorted(fields.keys() ^ own):
        raise CheckpointError(f"{folder}: a rollout of another version of fdfo_engine: {', '.join(differing)}")
    tensors = folder / f"{stem}.safetensors"
    if not tensors.is_file() or sha256_of(tensors) != record["tensors_sha256"]:
        raise CheckpointError(f"{tensors}: not as it was written")
    return fields
