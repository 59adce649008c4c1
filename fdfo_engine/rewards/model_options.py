"""What rewards that run a model have in common: typed options, loading with a readable error, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from fdfo_engine.config.section import Section
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound="ModelOptions")


class ModelOptions(Section):
    """Which model scores, where, and how many images at a time."""

    model: str = Field(min_length=1)
    """Hub id or folder."""

    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the newest."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the model computes in; scores are float32 in any case."""

    device: str = "auto"
    """`cpu`, `cuda:1`, ...; auto is the rank's own GPU, or the CPU where there is none."""

    batch_size: int = Field(default=16, ge=1)
    """Images scored together."""


def device_of(options: ModelOptions) -> torch.device:
    """`options.device`, with auto decided.

    Raises:
        RewardError: no such device here.
    """
    if options.device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RewardError(f"device = {options.device!r}: {str(error).splitlines()[0]}") from error
    return device


def loaded(what: str, model: str, load: Callable[[], T]) -> T:
    """What `load()` returns, or an error that stops the run: a reward that cannot load will not score later either.

    Raises:
        RewardError: no such model, or one of another kind.
        EnvironmentProblem: it needs a package that is not installed.
    """
    try:
        return load()
    except ImportError as error:
        raise EnvironmentProblem(f"{what} of {model}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RewardError(f"{what}: cannot load {model!r}: {first}; takes a hub id or a folder") from error


def ready_network(network: Any, device: torch.device) -> Any:
    """The network in evaluation mode, without gradients, on its device."""
    return network.to(device).eval().requires_grad_(False)


def micro_batches(prompts: Sequence[str], images: Tensor, size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Prompts and images, `size` at a time."""
    for first in range(0, len(images), size):
        yield list(prompts[first : first + size]), images[first : first + size]


class ModelReward(Generic[OptionsT]):
    """A reward that runs a model on one micro-batch of `options.batch_size` images at a time."""

    Options: type[OptionsT]

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Scores `[N]` of images `[N, 3, H, W]`."""
        batches = micro_batches(prompts, images, self.options.batch_size)
        return torch.cat([self._batch(*batch) for batch in batches])

    def _batch(self, prompts: list[str], images: Tensor) -> Tensor:
        raise NotImplementedError
