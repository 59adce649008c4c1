"""Images as models and servers take them: 8 bits, resized and cropped as Pillow does it, on the tensor's own device."""

from __future__ import annotations

import base64
import functools
import io

import torch
from PIL import Image
from torch import Tensor

_FIXED_POINT_BITS = 22  # of Pillow's resampling weights, for 8-bit pixels
_CUBIC = -0.5  # slope of Pillow's bicubic filter, which reaches two pixels to each side


def to_bytes(images: Tensor) -> Tensor:
    """Float images in 0..1 as whole numbers 0..255, uint8; values outside are clamped.

    Raises:
        ValueError: a pixel is NaN: such an image is not scored as if it were black.
    """
    if torch.isnan(images).any():
        raise ValueError("images hold NaN")
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Uint8 `[..., H, W]` resized to `[..., height, width]`, antialiased: Pillow's BICUBIC to the bit.

    One axis is filtered and rounded to 8 bits, then the other, with weights of 22 bits, whose sums float64 holds
    exactly. Rows come first, but as in Pillow 13 not where the height shrinks by more than twice what the width does.
    """
    shrunk_rows, shrunk_columns = images.shape[-2] - height, images.shape[-1] - width
    if shrunk_rows > 0 and shrunk_rows > 2 * shrunk_columns:
        return _filter(_filter_columns(images, height), width)
    return _filter_columns(_filter(images, width), height)


def center_crop(images: Tensor, height: int, width: int, *, rounds: bool = False) -> Tensor:
    """The middle `height` x `width` of `[..., H, W]`, which is no smaller.

    An odd rest is halved down; with `rounds` to the nearest, a half to the even, as torchvision does.
    """
    rests = images.shape[-2] - height, images.shape[-1] - width
    top, left = (round(rest / 2) if rounds else rest // 2 for rest in rests)
    return images[..., top : top + height, left : left + width]


def to_pil(image: Tensor) -> Image.Image:
    """One uint8 image `[3, H, W]`."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def png_base64(image: Tensor) -> str:
    """One uint8 image `[3, H, W]` as a PNG file in base64."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _filter(images: Tensor, size: int) -> Tensor:
    """Resizes the last axis."""
    if images.shape[-1] == size:
        return images
    weights = _weights(images.shape[-1], size).to(images.device)
    sums = images.double() @ weights.T
    one = 2.0**_FIXED_POINT_BITS
    return sums.add(one / 2).div(one).floor().clamp(0, 255).to(torch.uint8)


def _filter_columns(images: Tensor, size: int) -> Tensor:
    return _filter(images.transpose(-1, -2), size).transpose(-1, -2).contiguous()


@functools.lru_cache(maxsize=16)
def _weights(size: int, new_size: int) -> Tensor:
    """Float64 `[new_size, size]` of whole numbers: what each old pixel gives to each new one, times 2^22."""
    scale = size / new_size
    width = max(scale, 1.0)
    center = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale
    first = (center - 2 * width + 0.5).trunc().clamp(min=0)
    last = (center + 2 * width + 0.5).trunc().clamp(max=size)
    pixel = torch.arange(size, dtype=torch.float64)
    weights = _cubic((pixel - center[:, None] + 0.5) / width)
    weights = torch.where((pixel >= first[:, None]) & (pixel < last[:, None]), weights, 0.0)
    weights = weights / weights.sum(1, keepdim=True) * 2.0**_FIXED_POINT_BITS
    return weights.add(0.5 * weights.sign()).trunc()


def _cubic(x: Tensor) -> Tensor:
    x, a = x.abs(), _CUBIC
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
