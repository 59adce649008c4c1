"""What rewards that run a model have in common: typed options, loading with a readable error, micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from fdfo_engine.config.section import Section
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.runtime import pulse
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError
from fdfo_engine.runtime.hub import ask_hub, hub_errors, hub_reason, quiet_hub

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
OptionsT = TypeVar("OptionsT", bound="ModelOptions")

PARAMETERS = {
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986_109_441,
    "yuvalkirstain/PickScore_v1": 986_109_441,
    "adams-story/HPSv2-hf": 986_109_441,
    "openai/clip-vit-large-patch14": 427_616_513,
    "google/owlv2-base-patch16-ensemble": 154_966_792,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}
"""Weights of the default models, for a memory plan before anything is loaded."""


class ModelOptions(Section):
    """Which model scores, where, and how many images at a time."""

    model: str = Field(min_length=1)
    """Hub id or folder."""

    revision: str | None = None
    """Branch, tag or commit on the hub; null takes what is on this machine, or else the newest."""

    allow_download: bool = True
    """Lets the hub be asked, with a line that says so, for what is not on this machine; `fdfo evaluate` sets it."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the model computes in; scores are float32 in any case."""

    device: str = "auto"
    """`cpu`, `cuda:1`, ...; auto is the rank's own GPU, or the CPU where there is none."""

    batch_size: int = Field(default=16, ge=1)
    """Images scored together."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it loads from."""
        return (Source.of(self),)

    @property
    def networks(self) -> tuple[str, ...]:
        """Hub ids or folders of the networks that it loads."""
        return (self.model,)


@dataclass(frozen=True)
class Source:
    """A hub id with its revision, or a folder, and whether the hub may be asked."""

    model: str
    revision: str
    allow_download: bool

    @classmethod
    def of(cls, options: ModelOptions, model: str | None = None) -> Source:
        """Where the options' own model is, or another `model`, whose revision is the main one."""
        own = model is None or model == options.model
        revision = options.revision if own else None
        return cls(model or options.model, revision or "main", options.allow_download)

    @property
    def is_on_hub(self) -> bool:
        """Whether it is the name of a repository and not a folder's."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.model)
        except HFValidationError:
            return False
        return not Path(self.model).is_dir()

    def is_here(self) -> bool:
        """Whether this machine has it: the hub is not asked."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        if not self.is_on_hub:
            return True
        try:
            snapshot_download(self.model, revision=self.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return False
        return True

    def require_reachable(self) -> None:
        """Asks the hub for what is not on this machine and may be fetched.

        Raises:
            EnvironmentProblem: the hub refuses it, or is not reached.
        """
        if self.is_here():
            return
        try:
            ask_hub(self.model, "config.json", revision=self.revision)
        except hub_errors() as error:
            if reason := hub_reason(self.model, error, revision=self.revision):
                raise EnvironmentProblem(f"{self.model}: {reason}") from error


class FromPretrained(Protocol[T_co]):
    """`from_pretrained` of transformers, or what is called like it."""

    def __call__(self, model: str, /, *, revision: str, local_files_only: bool) -> T_co:
        """The thing in the folder or repository `model`."""
        ...


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


LOADING_S = 3600.0
"""How long weights may take to be fetched and read, of which no parts are told."""


def loaded(what: str, source: Source, read: FromPretrained[T]) -> T:
    """What `read` finds on this machine, or else on the hub; a reward that cannot load will not score later either.

    Raises:
        RewardError: no such model, or one of another kind.
        EnvironmentProblem: it needs a package that is not installed, or a download that was not allowed.
    """
    pulse.got_on(LOADING_S)
    try:
        return _read(what, source, read)
    except ImportError as error:
        raise EnvironmentProblem(f"{what} of {source.model}: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError) as error:
        if refusal := hub_reason(source.model, error, revision=source.revision):
            raise EnvironmentProblem(f"{what} of {source.model}: {refusal}") from error
        reason = _first_line(error)
        raise RewardError(f"{what}: cannot load {source.model!r}: {reason}; takes a hub id or a folder") from error


def _read(what: str, source: Source, read: FromPretrained[T]) -> T:
    try:
        return read(source.model, revision=source.revision, local_files_only=True)
    except OSError as error:
        if not source.is_on_hub:
            raise
        if not source.allow_download:
            raise EnvironmentProblem(_would_fetch(f"{what} of {source.model}")) from error
    say(f"fetching the {what} of {source.model} from huggingface.co")
    with quiet_hub():
        return read(source.model, revision=source.revision, local_files_only=False)


def _would_fetch(what: str) -> str:
    return (
        f"{what}: not on this machine; nothing is fetched unasked: allow it with --allow-download (of a reward: "
        "allow_download: true), or name a folder"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_auto(kind: Any, dtype: str) -> FromPretrained[Any]:
    """`from_pretrained` of one of transformers' auto classes, which looks for an adapter by a request of its own."""

    def read(model: str, /, *, revision: str, local_files_only: bool) -> Any:
        how = {"revision": revision, "local_files_only": local_files_only}
        return kind.from_pretrained(model, dtype=getattr(torch, dtype), adapter_kwargs=dict(how), **how)

    return read


def ready_network(network: Any, device: torch.device) -> Any:
    """The network in evaluation mode, without gradients, on its device."""
    return network.to(device).eval().requires_grad_(False)


def micro_batches(prompts: Sequence[str], images: Tensor, size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Prompts and images, `size` at a time."""
    for first in range(0, len(images), size):
        yield list(prompts[first : first + size]), images[first : first + size]


class ModelReward(Reward, Generic[OptionsT]):
    """A reward that runs a model on one micro-batch of `options.batch_size` images at a time."""

    Options: type[OptionsT]

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def require_ready(self) -> None:
        """Asks whether this machine has the models, or else, where they may be fetched, whether the hub gives them.

        Raises:
            EnvironmentProblem: one is not here, and may not be fetched or is not given.
        """
        for source in self.options.sources:
            if source.allow_download:
                source.require_reachable()
            elif not source.is_here():
                raise EnvironmentProblem(_would_fetch(source.model))

    def forbid_downloads(self) -> None:
        """Takes only what is on this machine, whatever the options say; before anything is loaded."""
        self.options = self.options.model_copy(update={"allow_download": False})

    def gpu_bytes(self) -> int | None:
        """What its weights take of a GPU, wherever this runs; None where the size of a model is not known unloaded."""
        if self.options.device == "cpu":
            return 0
        counts = [PARAMETERS.get(network) for network in self.options.networks]
        width = torch.empty((), dtype=getattr(torch, self.options.dtype)).element_size()
        return None if None in counts else width * sum(count for count in counts if count)

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Scores `[N]` of images `[N, 3, H, W]`."""
        batches = micro_batches(prompts, images, self.options.batch_size)
        return torch.cat([self._batch(*batch) for batch in batches])

    def _batch(self, prompts: list[str], images: Tensor) -> Tensor:
        raise NotImplementedError
