"""Values that are not finite, told where they arise, with the weight that is to blame where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fdfo_engine.models.flow_model import Conditioning
from fdfo_engine.runtime.errors import NumericsError
from fdfo_engine.runtime.split_weights import own_piece


class Weighted(Protocol):
    """Of a `FlowModel`, what a message about its values takes."""

    dtype: torch.dtype

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `FlowModel.named_weights`."""
        ...


def is_finite(tensor: Any) -> bool:
    """Whether every number is; of a weight that ZeRO-3 splits, this rank's part. Waits for the device."""
    own = own_piece(tensor)
    return not own.is_floating_point() or bool(torch.isfinite(own).all())


def first_bad(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first of `weights` that is not finite."""
    return next((name for name, weight in weights if not is_finite(weight)), None)


def blame(model: Weighted) -> str:
    """What to add to a message about a value of `model` that is not finite."""
    if name := first_bad(model.named_weights()):
        return f": its weight {name} is not finite"
    if model.dtype == torch.float16:
        return "; its weights are, but float16 ends at 65504: try model.dtype: bfloat16"
    return "; all its weights are"


def require_finite_row(model: Weighted, prompt: str, row: Conditioning) -> None:
    """Holds what the text encoders made of `prompt`.

    Raises:
        NumericsError: it is not finite.
    """
    for name, tensor in row.tensors.items():
        if not is_finite(tensor):
            raise NumericsError(f"the text encoders' {name} is not finite for the prompt {prompt!r}{blame(model)}")


def require_finite_images(model: Weighted, images: Tensor, names: Sequence[str]) -> None:
    """Holds the decoded `images` `[N, 3, H, W]`, whose latents are finite and which `names` names.

    Raises:
        NumericsError: one is not finite; names the first.
    """
    bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero()
    if len(bad):
        where = names[int(bad[0])]
        raise NumericsError(f"the VAE's decoder gave an image that is not finite for {where}{blame(model)}")
