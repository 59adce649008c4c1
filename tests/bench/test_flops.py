"""The formulas against what torch counts in a run of the network."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fdfo_engine.bench.architectures import architectures
from fdfo_engine.bench.flops import flops

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20}
BATCH = 3


def small(name):
    """The architecture `name` with all its kinds of blocks, small."""
    found = architectures()[name]
    if found.is_flux:
        sizes = {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 6, 6)}
    else:
        sizes = {"num_layers": 3, "dual_attention_layers": (0, 1), "caption_projection_dim": 32}
    return dataclasses.replace(found, config=found.config | SMALL | sizes, side=8, text_tokens=5, rank=4)


@pytest.mark.parametrize("name", ["sd35-medium", "flux1-dev"])
def test_formulas_are_what_torch_counts(name, monkeypatch):
    """Attention as plain products, which torch counts on any device; their backward keeps the scores: twice 2."""
    monkeypatch.setattr("fdfo_engine.bench.flops.ATTENTION_BACKWARD", 2)
    architecture = small(name)
    network = architecture.network(torch.device("cpu"))
    inputs = architecture.inputs(BATCH, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        out = network(**inputs)[0]
    with FlopCounterMode(display=False) as backward:
        out.square().sum().backward()
    expected = flops(architecture)
    assert forward.get_total_flops() == BATCH * expected.forward
    assert backward.get_total_flops() == BATCH * expected.backward


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("sd35-medium", 2.25, 2.67), ("sd35-large", 7.23, 8.08), ("flux1-dev", 21.6, 24.1)],
)
def test_real_sizes_in_tera(name, forward, backward):
    counted = flops(architectures()[name])
    assert counted.forward == pytest.approx(forward * 1e12, rel=0.02)
    assert counted.backward == pytest.approx(backward * 1e12, rel=0.03)
