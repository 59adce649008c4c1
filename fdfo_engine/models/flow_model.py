"""What the engine asks of a flow model: the one protocol behind which every family stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fdfo_engine.models.export_styles import ExportStyle
from fdfo_engine.ops import moved
from fdfo_engine.runtime.errors import UsageError

Network = Callable[..., tuple[Tensor, ...]]
"""The transformer, or the training engine that wraps it: called, never looked into (ZeRO-3 gathers in the call)."""


@dataclass(frozen=True)
class Grid:
    """The sampling grid of a run, taken from the pipeline's own scheduler.

    `sigmas`: float32 `[T + 1]` on the CPU, falling from the noisiest point to 0.
    `timesteps`: float32 `[T]` on the CPU, what the network is told at each step, in the family's own unit.

    Raises:
        UsageError: they are not so: no grid for this number of steps.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        sigmas = self.sigmas.tolist()
        is_finite = torch.isfinite(torch.cat([self.sigmas, self.timesteps])).all()
        is_falling = all(before >= after for before, after in pairwise(sigmas)) and sigmas[-1] == 0
        if not (is_finite and is_falling):
            shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:3])
            raise UsageError(
                f"sampling.steps = {self.steps}: the model's scheduler gives the grid {shown}, ...; "
                "takes finite numbers that fall to 0"
            )

    @property
    def steps(self) -> int:
        """Number of solver steps T."""
        return len(self.timesteps)


@dataclass(frozen=True)
class Conditioning:
    """What prompts become for the network: named tensors with one row a prompt."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Tensor) -> Conditioning:
        """The rows `index` (int64 `[N]`), repeated or reordered as it says."""
        there = moved(index, next(iter(self.tensors.values())).device)
        return Conditioning({name: t[there] for name, t in self.tensors.items()})

    def to(self, device: torch.device) -> Conditioning:
        """The same rows on `device`."""
        return Conditioning({name: moved(t, device) for name, t in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all `parts`, in order."""
        return Conditioning({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class TokenLimit:
    """How much of a prompt a text encoder reads.

    `reader`: its name. `most`: tokens, beyond which a prompt is cut. `count`: tokens of each of some prompts, with the
    special ones, uncut. `hint`: what to add to a message.
    """

    reader: str
    most: int
    count: Callable[[Sequence[str]], list[int]]
    hint: str = ""


class FlowModel(Protocol):
    """A text-to-image flow-matching model, loaded and ready to sample and train.

    Latents are float32 `[N, C, H, W]` outside; packing into tokens, the network's dtype and its timestep unit are
    the family's own business. `network` is what training wraps; the other parts (text encoders, VAE) stay frozen.
    """

    family: str
    network: nn.Module
    device: torch.device
    dtype: torch.dtype
    latent_shape: tuple[int, int, int]

    def grid(self, steps: int) -> Grid:
        """The grid that the family's pipeline uses for `steps` steps at this latent shape."""
        ...

    def text_encoders(self) -> AbstractContextManager[None]:
        """Within this context the text encoders are on `device`; outside they live on the CPU."""
        ...

    def encode_prompt(self, prompt: str) -> Conditioning:
        """One row for `prompt`. Encoded alone, so that an embedding never depends on its neighbours in a batch."""
        ...

    def token_limits(self) -> list[TokenLimit]:
        """Where prompts are cut, for each text encoder that does; empty where none is."""
        ...

    def velocity(self, network: Network, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity `noise - data`, `[N, C, H, W]` in the model's dtype, without guidance.

        `latents` float32 `[N, C, H, W]`, `timesteps` float32 `[N]`, `conditioning` N rows.
        """
        ...

    def guided(self, v: Tensor, v_uncond: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
        """What the step and the update combine by the plain rule of `guided_velocity`: `v` and `v_uncond` as they are.

        A family whose pipeline has another rule applies it here and returns the guided velocity and None: computed in
        float32, rounded once to the dtype of `v`, differentiable in both, row by row whatever the batch.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, height, width]`, float32 in 0..1, of final latents `[N, C, H, W]`."""
        ...

    def without_adapter(self) -> AbstractContextManager[None]:
        """Within this context the network is the base model: its LoRA is switched off."""
        ...

    def other_weights(self) -> Iterator[Tensor]:
        """Weights that stay on `device` beside the network's: the VAE's."""
        ...

    def text_weights(self) -> Iterator[Tensor]:
        """Weights of the text encoders, on `device` within `text_encoders` only."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of every part, as `vae.decoder.conv_in.weight`; read only for a message about one."""
        ...

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training moves: the LoRA, or every weight of the network."""
        ...

    def export(self, folder: Path, weights: dict[str, Tensor], style: ExportStyle = "diffusers") -> None:
        """Writes float32 `weights` (by `trained_parameters` name), verified by loading back.

        Style diffusers is what that loads, comfyui a LoRA in the names of the model's original code.
        """
        ...
