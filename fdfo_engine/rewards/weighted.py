"""The weighted list of a config as one reward, with every part logged by itself."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fdfo_engine.config import RewardConfig
from fdfo_engine.rewards.isolated import IsolatedReward
from fdfo_engine.rewards.manners import left_as_it_was
from fdfo_engine.rewards.registry import build
from fdfo_engine.rewards.reward import Reward, as_reward
from fdfo_engine.runtime import pulse
from fdfo_engine.runtime.console import complain, equal_warnings_counted, visible, warn
from fdfo_engine.runtime.distributed import all_gather_rows
from fdfo_engine.runtime.errors import FdfoError, RewardError
from fdfo_engine.runtime.failures import Failure
from fdfo_engine.runtime.masking import masked


def labelled(settings: Sequence[RewardConfig]) -> dict[str, RewardConfig]:
    """Every reward of a list by the name of its columns; a second one of a name has its position there behind it."""
    parts: dict[str, RewardConfig] = {}
    taken = {part.name for part in settings}
    for i, part in enumerate(settings):
        label = part.name if part.name not in parts else f"{part.name}_{i}"
        while label in parts or (label != part.name and label in taken):
            label += "_"
        parts[label] = part
    return parts


@dataclass
class WeightedRewards:
    """Scores images by several rewards. A part that fails twice has no opinion (NaN) on that batch: never a number."""

    rewards: dict[str, tuple[float, Reward]]
    log_folder: Path | None = None
    normalize: Mapping[str, str] = field(default_factory=dict)
    last_failure: dict[str, str] = field(default_factory=dict, init=False)
    """Why a reward last had no opinion, by name: the exception, and where in its code."""

    _traced: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False)
    _are_ready: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Takes plain callables too."""
        self.rewards = {name: (weight, as_reward(reward)) for name, (weight, reward) in self.rewards.items()}

    @classmethod
    def from_config(cls, settings: Sequence[RewardConfig], log_folder: Path | None = None) -> WeightedRewards:
        """Builds every reward of the list; see `labelled` for their names."""
        return cls.from_labelled(labelled(settings), log_folder)

    @classmethod
    def from_labelled(
        cls, parts: Mapping[str, RewardConfig], log_folder: Path | None = None, keys: Sequence[str] = ()
    ) -> WeightedRewards:
        """Builds every reward of `parts`, under the name it has there.

        `keys` are the settings or options that named them, for messages; `rewards.0.name` and so on by default.
        """
        keys = keys or [f"rewards.{i}.name" for i in range(len(parts))]
        rewards = {
            label: (part.weight, _built(part, key)) for (label, part), key in zip(parts.items(), keys, strict=True)
        }
        return cls(rewards, log_folder, {label: part.normalize for label, part in parts.items()})

    def without(self, names: Collection[str]) -> WeightedRewards:
        """The same rewards but for `names`."""
        others = {name: part for name, part in self.rewards.items() if name not in names}
        return WeightedRewards(others, self.log_folder, self.normalize)

    def gpu_bytes(self) -> tuple[int, list[str]]:
        """What all models take of a GPU, in bytes, and the names of the rewards whose models are not counted in it."""
        sizes = {name: reward.gpu_bytes() for name, (_, reward) in self.rewards.items()}
        return sum(size for size in sizes.values() if size), [name for name, size in sizes.items() if size is None]

    def require_ready(self) -> None:
        """Asks every reward, before a model is loaded, whether it can score; once all can, nobody is asked again.

        Raises:
            RewardError, EnvironmentProblem: one cannot, with its reason.
        """
        if self._are_ready:
            return
        for name, (_, reward) in self.rewards.items():
            _asked(name, reward.require_ready)
        self._are_ready = True

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Asks every reward whether it can score images of all of `prompts`.

        Raises:
            RewardError: one knows nothing about a prompt.
        """
        for name, (_, reward) in self.rewards.items():
            _asked(name, functools.partial(reward.require_prompts, prompts))

    def forbid_downloads(self) -> None:
        """Lets no reward fetch a model; before anything is loaded."""
        for _, reward in self.rewards.values():
            reward.forbid_downloads()

    def cancel(self) -> None:
        """Ends the waiting of every reward that waits for something outside: the run stops."""
        for _, reward in self.rewards.values():
            reward.cancel()

    def __call__(self, prompts: Sequence[str], images: Tensor) -> dict[str, Tensor]:
        """Each reward's scores of N images by its name, unweighted: float32 `[N]`, on the CPU; NaN = no opinion.

        Raises:
            RewardError: a reward returned something other than N numbers.
        """
        with equal_warnings_counted():
            return {name: self._score(name, reward, prompts, images) for name, (_, reward) in self.rewards.items()}

    def note_means(self) -> dict[str, float]:
        """Means of what the rewards note beside their scores, `answer_mass_vlm` say, since this was last called.

        Over the images of all ranks that have such a number; left out where none has. Collective.
        """
        means = {}
        for name, (_, reward) in self.rewards.items():
            for note, values in reward.take_notes().items():
                known = all_gather_rows(values)
                known = known[torch.isfinite(known)]
                if len(known):
                    means[f"{note}_{name}"] = float(known.double().mean())
        return means

    def combined(self, parts_PK: dict[str, Tensor]) -> Tensor:
        """The reward `[P, 2]` of an epoch's scores: the weighted sum of the parts, each as its `normalize` says.

        NaN where any part has no opinion.
        """
        scaled = {name: part / _scale(part, self.normalize.get(name)) for name, part in parts_PK.items()}
        return self._sum(scaled, torch.zeros_like(next(iter(scaled.values()))))

    def plain_mean(self, line: Mapping[str, float]) -> float:
        """The weighted sum of an epoch's logged means, without `normalize`, whose scales move with the epoch."""
        means = ((weight, line.get(f"reward_{name}_mean")) for name, (weight, _) in self.rewards.items())
        return sum(weight * (math.nan if mean is None else mean) for weight, mean in means)

    def disagreements(self, parts_PK: dict[str, Tensor]) -> dict[str, float]:
        """`disagreement_a_b`: share of the pairs in which a and b, as weighted, prefer different images.

        Of the pairs in which both prefer one; left out where there are none.
        """
        prefers = {
            name: torch.sign(part[:, 0] - part[:, 1]).nan_to_num(0.0) * (1 if self.rewards[name][0] > 0 else -1)
            for name, part in parts_PK.items()
        }
        found = {}
        for (a, first), (b, second) in itertools.combinations(prefers.items(), 2):
            if int((both := first * second != 0).sum()):
                found[f"disagreement_{a}_{b}"] = float((first != second)[both].double().mean())
        return found

    def describe(self, parts_PK: dict[str, Tensor]) -> str:
        """A table of an epoch's scores: what each reward gives, and how hard it pulls within pairs, weight applied."""
        lines = [f"{'reward':30} {'mean':>10} {'std':>10} {'weight':>8} {'pull':>10}"]
        for name, part in parts_PK.items():
            known, weight = part[torch.isfinite(part)].double(), self.rewards[name][0]
            pull = weight / _scale(part, self.normalize.get(name)) * _scale(part, "pair")
            mean, std = (float(known.mean()), float(known.std(correction=0))) if len(known) else (0.0, 0.0)
            lines.append(f"{visible(name)[:30]:30} {mean:10.4g} {std:10.4g} {weight:8.4g} {pull:10.4g}")
        return "\n".join(lines)

    def _sum(self, parts: dict[str, Tensor], zero: Tensor) -> Tensor:
        total = sum((self.rewards[name][0] * part for name, part in parts.items()), zero)
        return torch.where(torch.isfinite(total), total, torch.nan)

    def _score(self, name: str, reward: Reward, prompts: Sequence[str], images: Tensor) -> Tensor:
        for attempt in (1, 2):
            pulse.got_on()
            call = functools.partial(reward, list(prompts), images.clone())  # it may write into its own ones
            try:
                with torch.no_grad():
                    scores = left_as_it_was(name, call)
            except (FdfoError, torch.OutOfMemoryError, MemoryError):
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001 - anybody's code; its failure costs an opinion only
                self._report(name, Failure.of(error), attempt)
                continue
            return _checked(name, scores, len(images))
        return torch.full((len(images),), torch.nan)

    def _report(self, name: str, failure: Failure, attempt: int) -> None:
        """A line, and the first time the traceback; the log keeps every one."""
        what = "trying once more" if attempt == 1 else "no opinion on this batch"
        warn(f"reward {name!r}: {failure}; {what}", everywhere=True)
        if (name, str(failure)) not in self._traced:
            self._traced.add((name, str(failure)))
            complain(failure.trace.rstrip(), everywhere=True)
        self.last_failure[name] = str(failure)
        if self.log_folder is not None:
            _append(self.log_folder / f"reward_{re.sub('[^A-Za-z0-9._-]', '_', name)}.log", failure.trace)


def _append(file: Path, text: str) -> None:
    """Nothing depends on these logs: where the storage refuses, a warning says so."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(masked(text))
    except OSError as error:
        warn(f"{file}: not written: {error.strerror}", like="a reward's log")


def _asked(name: str, question: Callable[[], None]) -> None:
    """Asks a question of `Reward`; anybody's code may answer."""
    try:
        left_as_it_was(name, question)
    except (FdfoError, torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {name!r}: {Failure.of(error)}") from error


def _built(part: RewardConfig, where: str) -> Reward:
    options = dict(part.model_extra or {})
    if part.kill_after_s is None:
        return build(part.name, options, where)
    return IsolatedReward(part.name, options, where, part.kill_after_s)


def _scale(part_PK: Tensor, normalize: str | None) -> float:
    """What a part is divided by; 1 where it prefers nothing, and so pulls at nothing whatever its scale."""
    if normalize == "std":
        spread = part_PK[torch.isfinite(part_PK)].double()
        scale = float(spread.std(correction=0)) if len(spread) else 0.0
    elif normalize == "pair":
        halves = (part_PK[:, 0] - part_PK[:, 1]).double() / 2
        halves = halves[torch.isfinite(halves)]
        scale = float(halves.square().mean().sqrt()) if len(halves) else 0.0
    else:
        return 1.0
    return scale if scale > 0 else 1.0


def _checked(name: str, scores: Tensor, count: int) -> Tensor:
    if isinstance(scores, Tensor) and (scores.layout != torch.strided or scores.is_complex()):
        kind = "complex numbers" if scores.is_complex() else f"a tensor of layout {scores.layout}"
        raise RewardError(f"reward {name!r} returned {kind}; it takes {count} plain numbers")
    try:
        tensor = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        why = f": {error}" if isinstance(error, OverflowError) else ""
        raise RewardError(
            f"reward {name!r} returned a {type(scores).__name__}; it takes {count} numbers{why}"
        ) from error
    if tensor.shape != (count,):
        got = f"{tensor.shape[0]} scores" if tensor.ndim == 1 else f"shape {tuple(tensor.shape)}"
        raise RewardError(f"reward {name!r} returned {got} for {count} images; it takes one number an image")
    return tensor
