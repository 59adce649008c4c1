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
    """Uint8 `[..., H, W]` resized to `[..., height, width]`, antialiased.

    Rows are filtered and rounded to 8 bits, then columns, with weights of 22 bits, whose sums float64 holds exactly. So
    it equals Pillow's BICUBIC to the bit for square images and for enlarging. Of some tall images Pillow filters the
    columns first: up to a tenth of the values then differ, by a level or two.
    """
    rows = _filter(images, width)
    return _filter(rows.transpose(-1, -2), height).transpose(-1, -2).contiguous()


def center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle `height` x `width` of `[..., H, W]`, which is no smaller."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
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
