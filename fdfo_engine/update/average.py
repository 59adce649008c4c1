"""The exponential moving average of the trained weights."""

from torch import Tensor


def move_average(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """Moves `average` in place: `decay` of it stays, the rest is of `weights`."""
    for name, weight in weights.items():
        average[name].lerp_(weight, 1 - decay)
