"""Counted bytes against sums by hand."""

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from fdfo_engine.planning.footprint import peak_bytes, saved_bytes


def test_saved_bytes_are_the_activations_and_not_the_weights():
    first, second = nn.Linear(8, 32, bias=False), nn.Linear(32, 4, bias=False)
    x = torch.randn(16, 8)
    owned = [*first.parameters(), *second.parameters()]
    # x for the first weight's gradient; the product before the activation, which it keeps; its result for the second
    saved = saved_bytes(lambda: second(nn.functional.gelu(first(x))), owned)
    assert saved == 4 * 16 * (8 + 32 + 32)
    first.requires_grad_(False)
    assert saved_bytes(lambda: second(first(x)), owned) == 4 * 16 * 32


def test_a_storage_counts_once():
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: (x.view(2, 5) * x.view(2, 5).exp()).sum(), []) == 4 * (10 + 10)


def test_peak_is_what_lives_at_once():
    x = torch.randn(1000)

    def chain():
        y = x + 1
        y = y * 2  # the sum is freed only after the product is there
        return y * 3

    assert peak_bytes(chain) == 2 * 4000
    assert peak_bytes(lambda: x.add_(1)) == 0
    assert peak_bytes(lambda: x.view(10, 100)) == 0


def test_fake_tensors_count_as_real_ones():
    def counts():
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(16, 2, batch_first=True)
        x = torch.randn(2, 6, 16)

        def forward():
            return nn.functional.gelu(layer(x, x, x, need_weights=False)[0])

        with torch.no_grad():
            peak = peak_bytes(forward)
        return saved_bytes(forward, layer.parameters()), peak

    real = counts()
    with FakeTensorMode():
        assert counts() == real
