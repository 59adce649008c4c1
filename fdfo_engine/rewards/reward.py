"""What the engine asks of a reward: scores, and seven things with defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fdfo_engine.rewards.drawings import CIRCLE_PROMPT, circle_and_noise
from fdfo_engine.runtime.errors import UsageError

Scorer = Callable[[Sequence[str], Tensor], Any]
"""What anybody may bring: `(prompts, images [N, 3, H, W] float32 in 0..1) -> N numbers`, NaN = no opinion."""


class Reward:
    """Scores images. Besides `__call__`, each method has a default that suits a function which needs nothing."""

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Any:
        """One score an image: higher is better, NaN = no opinion.

        Args:
            prompts: N texts.
            images: `[N, 3, H, W]`, float32 in 0..1, on the device they were decoded on.

        Returns:
            `[N]` numbers, as a tensor or a sequence.
        """
        raise NotImplementedError

    def require_ready(self) -> None:
        """Called once, before any model loads. By default nothing is needed.

        Raises:
            RewardError, EnvironmentProblem: scoring could not work: a server is down, a package is missing.
        """

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """Called once with all prompts of the run, before any model loads. By default every prompt will do.

        Raises:
            RewardError: it knows nothing about one of them.
        """

    def forbid_downloads(self) -> None:
        """From now on only models on this machine may be loaded. By default there are none."""

    def gpu_bytes(self) -> int | None:
        """Bytes that its weights take of a GPU; None = not known before they are loaded. By default 0."""
        return 0

    def cancel(self) -> None:
        """Ends its waiting for something outside: the run stops. Comes from another thread. By default none waits."""

    def take_notes(self) -> dict[str, Tensor]:
        """Numbers to log beside the scores: by name `[n]`, one an image scored since this was last called.

        The names are always the same, whatever was scored. By default there are none.
        """
        return {}

    def self_test_case(self, side: int) -> tuple[str, Tensor]:
        """A prompt and two images `[2, 3, side, side]`, of which anyone would prefer the first for it.

        By default a red circle, and noise.
        """
        return CIRCLE_PROMPT, circle_and_noise(side)


class FunctionReward(Reward):
    """A plain callable as a `Reward`."""

    def __init__(self, function: Scorer) -> None:
        self.function = function

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Any:
        """What the function returns."""
        return self.function(prompts, images)


def as_reward(scorer: Reward | Scorer) -> Reward:
    """`scorer` itself where it is a `Reward`, else a `Reward` that calls it.

    Raises:
        UsageError: it has methods of `Reward` and is none: they would never be called.
    """
    if isinstance(scorer, Reward):
        return scorer
    methods = [name for name in vars(Reward) if not name.startswith("_") and hasattr(scorer, name)]
    if methods:
        raise UsageError(
            f"reward {type(scorer).__name__}: has {', '.join(methods)}, which only a Reward is asked for; derive its "
            "class from fdfo_engine.rewards.Reward"
        )
    return FunctionReward(scorer)
