"""The average of the weights, held against its closed form in float64."""

import pytest
import torch

from fdfo_engine.update.average import move_average


@pytest.mark.parametrize("decay", [0.9, 0.5, 0.25, 0.999])
def test_an_average_is_the_decayed_sum_of_all_weights(decay):
    generator = torch.Generator().manual_seed(0)
    first, *later = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    average = {"w": first.clone()}
    for weights in later:
        move_average(average, {"w": weights}, decay)
    count = len(later)
    shares = [(1 - decay) * decay ** (count - 1 - i) for i in range(count)]
    wanted = decay**count * first + sum(share * weights for share, weights in zip(shares, later, strict=True))
    assert (average["w"] - wanted).abs().max() < 1e-12
