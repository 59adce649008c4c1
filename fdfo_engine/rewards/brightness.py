"""The simplest reward there is: for tests, and as a template for your own."""

from collections.abc import Sequence

from torch import Tensor

from fdfo_engine.rewards.registry import register


@register("brightness")
def brightness(prompts: Sequence[str], images: Tensor) -> Tensor:
    """Mean pixel value, 0..1 `[N]`; the prompts don't matter."""
    del prompts
    return images.float().flatten(1).mean(1)
