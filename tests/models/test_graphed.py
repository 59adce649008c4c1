"""CUDA graphs of a rollout's forward."""

import pytest
import torch
from torch import nn

from fdfo_engine.models.graphed import GraphedNetwork, graph_refusals

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "stage", "is_compiled", "says"),
    [
        (torch.device("cpu"), 1, False, "the model is on cpu"),
        (CUDA, 3, False, "zero.stage 3"),
        (CUDA, 0, True, "model.compile"),
    ],
)
def test_each_refusal_has_its_reason(device, stage, is_compiled, says):
    reasons = graph_refusals(device, zero_stage=stage, is_compiled=is_compiled)
    assert len(reasons) == 1
    assert says in reasons[0]


def test_it_fits_on_a_gpu_at_the_other_stages():
    assert [graph_refusals(CUDA, zero_stage=stage, is_compiled=False) for stage in (0, 1, 2)] == [[], [], []]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_is_the_network_with_the_weights_of_the_moment():
    torch.manual_seed(0)
    linear = nn.Linear(8, 8, device="cuda")
    graphed = GraphedNetwork(lambda *, x, shift: (linear(x) + shift,))
    for rows in (4, 4, 2):
        x = torch.randn(rows, 8, device="cuda")
        (kept,) = graphed(x=x, shift=1.0)
        expected = linear(x) + 1.0
        with torch.no_grad():
            linear.weight.mul_(2)
        (after,) = graphed(x=x, shift=1.0)
        assert torch.equal(kept, expected)
        assert torch.equal(after, linear(x) + 1.0)
