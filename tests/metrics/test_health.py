"""Health measures on pictures whose values are known by construction."""

import colorsys

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from fdfo_engine.config import HEALTH_MEASURES
from fdfo_engine.metrics import HEALTH, health_drift, measure_health

NOISE = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def measured(picture, name):
    return float(measure_health(picture[None], [name])[name])


def board(cell, height=64, width=64):
    rows, columns = torch.arange(height)[:, None] // cell, torch.arange(width)[None, :] // cell
    return ((rows + columns) % 2).float().expand(3, height, width)


def blurred(picture, sigma=1.5):
    return torch.from_numpy(ndimage.gaussian_filter(picture.numpy(), (0, sigma, sigma), mode="wrap"))


def luma(picture):
    return (picture.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).numpy()


def test_the_settings_know_the_same_names():
    assert tuple(HEALTH) == HEALTH_MEASURES


@pytest.mark.parametrize("gray", [0.0, 0.3, 1.0])
def test_a_flat_gray_picture_has_nothing(gray):
    flat = torch.full((3, 33, 40), gray)
    for name in set(HEALTH) - {"clipped"}:
        assert measured(flat, name) == pytest.approx(0, abs=1e-6), name
    assert measured(flat, "clipped") == float(gray != 0.3)


def test_a_checkerboard_of_pixels():
    assert measured(board(1), "checkerboard") == pytest.approx(1)
    assert measured(board(1)[:, :1].expand(3, 64, 64), "checkerboard") == pytest.approx(1), "stripes"
    assert measured(blurred(board(1) + NOISE[0, :, :1, :64] * 0.1), "checkerboard") < 1e-3
    assert measured(board(8), "checkerboard") < 0.2


def test_checkerboard_of_white_noise_is_the_share_of_its_frequencies():
    noise = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(1))
    assert measured(noise, "checkerboard") == pytest.approx(1 - 0.9**2, abs=0.02)


def test_checkerboard_is_a_share_by_parseval():
    """By another way: energy of the picture that is left after everything coarser was filtered out."""
    y = luma(NOISE[0]) - luma(NOISE[0]).mean()
    spectrum = np.fft.fft2(y)
    fy, fx = np.abs(np.fft.fftfreq(48))[:, None], np.abs(np.fft.fftfreq(64))[None]
    fine = np.fft.ifft2(np.where(np.maximum(fy, fx) >= 0.45, spectrum, 0)).real
    assert measured(NOISE[0], "checkerboard") == pytest.approx((fine**2).sum() / (y**2).sum(), rel=1e-6)


@pytest.mark.parametrize("period", [8, 16])
def test_a_grid_of_seams_shows_on_top_of_a_picture(period):
    picture = blurred(NOISE[1], 2.0)
    seams = torch.zeros(3, 48, 64)
    seams[:, ::period], seams[:, :, ::period] = 0.5, 0.5
    plain, tiled = measured(picture, "grid_energy"), measured((picture + seams).clamp(0, 1), "grid_energy")
    assert plain < 0.35
    assert tiled > 0.8
    assert measured(seams, "grid_energy") == pytest.approx(1, abs=1e-6)


def test_grid_energy_of_noise_prefers_no_frequency():
    noise = torch.rand(16, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    assert abs(float(measure_health(noise, ["grid_energy"])["grid_energy"].mean())) < 0.1


def test_blur_lowers_sharpness_and_edges_and_both_match_scipy():
    for name in ("sharpness", "edge_density"):
        assert measured(blurred(NOISE[0]), name) < 0.5 * measured(NOISE[0], name)
    y = luma(NOISE[0])
    laplacian = ndimage.laplace(y)[1:-1, 1:-1]
    assert measured(NOISE[0], "sharpness") == pytest.approx(laplacian.std(ddof=1), rel=1e-6)
    gradient = np.hypot(ndimage.sobel(y, 0) / 8, ndimage.sobel(y, 1) / 8)[1:-1, 1:-1]
    assert measured(NOISE[0], "edge_density") == pytest.approx((gradient > 0.1).mean(), rel=1e-6)


def test_edge_density_of_a_step_is_its_two_columns():
    step = torch.zeros(3, 20, 20)
    step[:, :, 10:] = 1
    assert measured(step, "edge_density") == pytest.approx(2 / 18)


def test_saturation_matches_the_standard_library():
    pixels = NOISE[2].flatten(1).T.tolist()
    expected = np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels])
    assert measured(NOISE[2], "saturation") == pytest.approx(expected, abs=1e-4)
    pure = torch.zeros(3, 16, 16)
    pure[0] = 1
    assert measured(pure, "saturation") == pytest.approx(1)
    assert measured(0.5 + 0.5 * pure, "saturation") == pytest.approx(0.5)


def test_a_picture_does_not_depend_on_its_batch_and_nan_is_no_number():
    broken = NOISE.clone()
    broken[1, 0, 0, 0] = torch.nan
    whole, alone = measure_health(broken, HEALTH), measure_health(NOISE[2:], HEALTH)
    for name in HEALTH:
        assert whole[name][2] == alone[name][0]
        assert torch.isnan(whole[name][1])
        assert torch.isfinite(whole[name][[0, 2]]).all()


def test_what_lies_outside_of_the_range_is_measured_at_its_ends():
    wide = 3 * NOISE - 1
    for name, values in measure_health(wide, HEALTH).items():
        assert torch.equal(values, measure_health(wide.clamp(0, 1), [name])[name]), name
        assert not torch.equal(values, measure_health(NOISE, [name])[name]), name


def test_bfloat16_and_strided_pictures_are_measured_in_double():
    strided = NOISE.permute(0, 1, 3, 2)
    for name, values in measure_health(strided, HEALTH).items():
        assert torch.equal(values, measure_health(strided.contiguous(), [name])[name])
        near = measure_health(NOISE.bfloat16(), [name])[name]
        assert functional.mse_loss(near, measure_health(NOISE, [name])[name]).sqrt() < 0.03


def test_drift_counts_in_spreads_of_the_base():
    assert health_drift("saturation", 0.7, 0.3, 0.2) == pytest.approx(2.0)
    assert health_drift("saturation", 0.3, 0.3, 0.0) == 0.0
    assert health_drift("saturation", 0.36, 0.3, 0.0) == pytest.approx(2.0), "counted in the least spread"
