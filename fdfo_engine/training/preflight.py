"""What can be known of a run before a weight is loaded: what `--dry-run` looks at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fdfo_engine.config import Config
from fdfo_engine.evaluation import evaluation_list, metric_rewards
from fdfo_engine.evaluation.overlap import warn_of_overlap
from fdfo_engine.models.quantized import quantizing_library
from fdfo_engine.models.registry import require_model
from fdfo_engine.report.model_card import UNKNOWN, base_licence
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.rollout.prompts import PromptList, describe_prompts, load_prompts
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.errors import EnvironmentProblem, FdfoError
from fdfo_engine.runtime.hub import hub_errors, weight_files
from fdfo_engine.runtime.run_log import tracker_library

GB = 1e9
LEAST_FREE_BYTES = 1e9
"""Less is no place for a run: checkpoints of a LoRA take some hundred MB each."""


@dataclass(frozen=True)
class Finding:
    """What was found of one thing that a run needs.

    Attributes:
        subject: prompts, rewards and so on.
        text: how it is, or why it would stop the run.
        exit_code: of the run that it would stop; 0 where all is well.
    """

    subject: str
    text: str
    exit_code: int = 0

    def describe(self) -> str:
        """A line for the terminal."""
        return f"  {'problem' if self.exit_code else 'ok':8}{self.subject:12}{self.text}"


def preflight(config: Config) -> Iterator[Finding]:
    """Looks at prompts, rewards, packages, model and disk of a run, one after another.

    No weight is loaded. Of a model on the hub its index is fetched, a few hundred bytes; servers of rewards are asked
    whether they are there.
    """
    read = _Prompts(config)
    checks: dict[str, Callable[[], str]] = {
        "prompts": lambda: describe_prompts(read.trained, config.sampling.pairs_per_epoch),
        "evaluation": lambda: _evaluation(config, read),
        "rewards": lambda: _rewards(config, read),
        "packages": lambda: _packages(config),
        "model": lambda: _model(config),
        "disk": lambda: _disk(config),
    }
    told = set()
    for subject, check in checks.items():
        try:
            yield Finding(subject, check())
        except FdfoError as error:
            if str(error) not in told:  # what several of them need is told once
                yield Finding(subject, str(error), error.exit_code)
            told.add(str(error))


def look_at(config: Config) -> int:
    """Prints what is found of the run that `config` describes.

    Returns the exit status: of the first thing that would stop the run, else 0.
    """
    say("\nlooking at prompts, rewards, model and disk; no weight is loaded")
    status = 0
    for finding in preflight(config):
        say(finding.describe())
        status = status or finding.exit_code
    return status


def require_packages(config: Config) -> None:
    """Asks for the packages that only some settings need.

    Raises:
        EnvironmentProblem: one is not installed; says how it is.
    """
    if config.log.wandb:
        tracker_library()
    if config.model.quantize:
        quantizing_library()


class _Prompts:
    """The run's lists, each read once, when it is first asked for."""

    def __init__(self, config: Config) -> None:
        self._config = config

    @cached_property
    def trained(self) -> PromptList:
        return load_prompts(self._config.prompts, self._config.run.seed)

    @cached_property
    def held_out(self) -> PromptList:
        return evaluation_list(self._config)


def _evaluation(config: Config, read: _Prompts) -> str:
    if not config.evaluation.every:
        return "off (evaluation.every = 0)"
    count = min(config.evaluation.count, len(read.held_out))
    warn_of_overlap(config, read.trained.prompts, read.held_out.prompts[:count])
    return f"every {config.evaluation.every} epochs, on {count} of {describe_prompts(read.held_out)}"


def _rewards(config: Config, read: _Prompts) -> str:
    weighted, metrics = WeightedRewards.from_config(config.rewards), metric_rewards(config)
    for rewards in (weighted, metrics):
        rewards.require_ready()
    weighted.require_prompts(read.trained.prompts)
    metrics.require_prompts(read.held_out.prompts[: config.evaluation.count])
    further = [f"{name} (metric)" for name in metrics.rewards if name not in weighted.rewards]
    return ", ".join([*weighted.rewards, *further])


def _packages(config: Config) -> str:
    require_packages(config)
    return "all that the settings need are installed"


def _model(config: Config) -> str:
    name = config.model.id
    folder = require_model(config)
    licence = base_licence(name)
    known = "see its page" if licence == UNKNOWN else licence
    if folder is None or name == "shapes" or Path(name).is_dir():
        return f"{name}, licence: {known}"
    missing = _bytes_to_fetch(config, folder)
    if missing is None:
        return (
            f"{name}, its index in the hub's cache, the rest not looked at: the hub was not reached; licence: {known}"
        )
    place = f"{missing / GB:.1f} GB to be fetched from the hub" if missing else "in the hub's cache"
    return f"{name}, {place}, licence: {known}"


def _disk(config: Config) -> str:
    free = _free_bytes(Path(config.run.dir))
    if free < LEAST_FREE_BYTES:
        raise EnvironmentProblem(f"run.dir = {config.run.dir!r}: {free / GB:.1f} GB free there; a run takes more")
    return f"{free / GB:.0f} GB free for {config.run.dir}"


def _bytes_to_fetch(config: Config, folder: Path) -> int | None:
    """Bytes of the model's weights that `folder` of the hub's cache lacks; None where the hub does not list them.

    Raises:
        EnvironmentProblem: the cache's disk has no room for them.
    """
    from huggingface_hub import constants

    try:
        listed = weight_files(config.model.id, folder.name)
    except hub_errors():
        return None  # the index came out of the cache: whether the rest is there too is seen when it is loaded
    variant = config.model.variant
    wanted = {name: size for name, size in listed.items() if _is_of_variant(Path(name).name, variant)}
    missing = sum(size for name, size in wanted.items() if not (folder / name).is_file())
    free = _free_bytes(Path(constants.HF_HUB_CACHE))
    if missing > free:
        raise EnvironmentProblem(
            f"model.id = {config.model.id!r}: {missing / GB:.1f} GB to fetch, and {free / GB:.1f} GB free in "
            f"{constants.HF_HUB_CACHE}; HF_HOME names another place"
        )
    return missing


def _is_of_variant(file: str, variant: str | None) -> bool:
    """`model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors` are of the variant fp16."""
    stem = file.removesuffix(".safetensors").split("-0")[0]
    _, dot, of_file = stem.partition(".")
    return of_file == (variant or "") if dot else variant is None


def _free_bytes(folder: Path) -> int:
    """Where `folder` is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free
