"""Image-health measures: plain statistics of pixels that move when a run pleases its reward by an artefact.

None of them is good or bad by itself: what counts is how far a trained model moved from its base on the same prompts
and seeds (`health_drift`). All take images `[N, 3, H, W]` in 0..1, at least 8 pixels a side, and give float32 `[N]`
on the CPU; an image's value does not depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GRID_PERIODS = (8, 16)
"""Pixels: what one latent pixel and one patch of the usual autoencoders and transformers cover."""

EDGE_THRESHOLD = 0.1
"""Luma a pixel, of a range of 1."""

NYQUIST_BAND = 0.45
"""Cycles a pixel; 0.5 is the finest pattern that pixels can show."""

_LUMA = (0.299, 0.587, 0.114)
_LEAST_ENERGY = 1e-12
_LEAST_AMPLITUDE = 1e-3


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of HSV saturation `(max - min) / max` of R, G, B; 0 for black. In 0..1 (Smith 1978)."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp_min(_LEAST_AMPLITUDE)).flatten(1).mean(1)


def clipped(images: Tensor) -> Tensor:
    """Share of channel values within 1/255 of 0 or of 1: what 8 bits cannot tell from black or full."""
    return ((images <= 1 / 255) | (images >= 254 / 255)).double().flatten(1).mean(1)


def sharpness(images: Tensor) -> Tensor:
    """Standard deviation over pixels of luma's Laplacian (4 neighbours), after Pech-Pacheco et al. (2000)."""
    kernel = images.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return functional.conv2d(luma(images)[:, None], kernel[None, None]).flatten(1).std(1)


def edge_density(images: Tensor) -> Tensor:
    """Share of pixels where luma's gradient (Sobel, in luma a pixel) is above `EDGE_THRESHOLD`."""
    across = images.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    gradient = functional.conv2d(luma(images)[:, None], torch.stack([across, across.T])[:, None])
    return (gradient.square().sum(1).sqrt() > EDGE_THRESHOLD).double().flatten(1).mean(1)


def checkerboard(images: Tensor) -> Tensor:
    """Share of luma's spectral energy, its mean left out, where `max(|fx|, |fy|) >= NYQUIST_BAND` cycles a pixel.

    1 for a checkerboard or stripes of single pixels, about 0 for anything smooth, 0 for a flat image.
    """
    y = luma(images)
    power = torch.fft.fft2(y - y.mean((1, 2), keepdim=True)).abs().square()
    fy, fx = (torch.fft.fftfreq(n, device=y.device, dtype=y.dtype).abs() for n in y.shape[1:])
    fine = torch.maximum(fy[:, None], fx[None, :]) >= NYQUIST_BAND
    return _share(power[:, fine].sum(1), power.flatten(1).sum(1), y[0].numel() ** 2)


def grid_energy(images: Tensor) -> Tensor:
    """How much luma's steps repeat every 8 or 16 pixels: the seams of latent pixels and patches.

    For each axis, `d` = mean over lines of `|luma step|` along it; of `d`'s power spectrum, the share at the harmonics
    of 1 / period, less the share b of such frequencies, over 1 - b: 0 where no frequency is preferred (or a
    little less), 1 where nothing but the grid is there. Mean of both axes, largest of the periods that fit twice. After
    Wang, Bovik and Evans, Blind measurement of blocking artifacts in images (2000).
    """
    y = luma(images)
    lines = [y.diff(dim=2).abs().mean(1), y.diff(dim=1).abs().mean(2)]
    periods = [p for p in GRID_PERIODS if min(line.shape[1] for line in lines) >= 2 * p]
    shares = [torch.stack([_periodic(line, period) for line in lines]).mean(0) for period in periods]
    return torch.stack(shares).amax(0) if shares else y.new_zeros(len(y))


def luma(images: Tensor) -> Tensor:
    """`[N, H, W]`: BT.601 luma of `[N, 3, H, W]`."""
    return torch.einsum("nchw,c->nhw", images, images.new_tensor(_LUMA))


@dataclass(frozen=True)
class HealthMeasure:
    """A measure, and the least spread that its drift is counted in: smaller changes cannot be seen."""

    measure: Callable[[Tensor], Tensor]
    least_spread: float


HEALTH = {
    "saturation": HealthMeasure(saturation, 0.03),
    "clipped": HealthMeasure(clipped, 0.05),
    "sharpness": HealthMeasure(sharpness, 0.02),
    "edge_density": HealthMeasure(edge_density, 0.02),
    "checkerboard": HealthMeasure(checkerboard, 0.02),
    "grid_energy": HealthMeasure(grid_energy, 0.1),
}
"""Every measure by the name that settings and reports use."""


@torch.no_grad()
def measure_health(images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """The measures `names` of images `[N, 3, H, W]` in 0..1, one number an image; NaN where an image is not finite."""
    exact = images.detach().double().clamp(0, 1)
    whole = torch.isfinite(exact).flatten(1).all(1)
    exact = torch.where(whole[:, None, None, None], exact, 0.0)
    values = {name: HEALTH[name].measure(exact) for name in names}
    return {name: torch.where(whole, value, torch.nan).float().cpu() for name, value in values.items()}


def health_drift(name: str, mean: float, base_mean: float, base_spread: float) -> float:
    """How far the measure's mean moved from the base's, in standard deviations over the base's images."""
    return (mean - base_mean) / max(base_spread, HEALTH[name].least_spread)


def _periodic(line: Tensor, period: int) -> Tensor:
    count = line.shape[1] // period * period  # so that the harmonics fall on whole frequencies
    whole = line[:, :count]
    power = torch.fft.rfft(whole - whole.mean(1, keepdim=True)).abs().square()[:, 1:]
    harmonics = torch.arange(1, power.shape[1] + 1, device=line.device) % (count // period) == 0
    chance = float(harmonics.double().mean())
    share = _share(power[:, harmonics].sum(1), power.sum(1), count**2)
    flat = power.sum(1) <= _LEAST_ENERGY * count**2
    return torch.where(flat, 0.0, (share - chance) / (1 - chance))


def _share(part: Tensor, whole: Tensor, scale: float) -> Tensor:
    """`part / whole`, and 0 where there is no energy but that of rounding."""
    return torch.where(whole > _LEAST_ENERGY * scale, part / whole.clamp_min(_LEAST_ENERGY * scale), 0.0)
