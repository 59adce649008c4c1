"""Weights side by side in one buffer: what they compute, and that a move of any of them is noticed."""

import pytest
import torch
from torch import nn

from fdfo_engine.models.fused.joint_weights import JointWeights

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    made = [nn.Linear(5, width).requires_grad_(False) for width in (4, 2, 6)]
    return made


def exact(layers):
    return [X.double() @ layer.weight.double().T + layer.bias.double() for layer in layers]


def test_together_they_compute_what_each_does(layers):
    wanted = exact(layers)
    joint = JointWeights.of(layers)
    assert joint.runs(layers)
    assert joint.holds()
    for found, want in zip(joint.together(X), wanted, strict=True):
        assert (found.double() - want).abs().max() < 1e-6


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_moved_lets_the_buffer_go(layers, number, name):
    joint = JointWeights.of(layers)
    moved = getattr(layers[number], name)
    moved.data = moved.data + 1.0
    assert not joint.runs(layers)
    assert not joint.holds()
    assert joint.weight is None
    assert joint.bias is None
    moved.data = moved.data - 1.0
    assert not joint.runs(layers)  # for good: the buffer is gone


def test_a_parameter_that_trains_or_another_layer_does_not_run(layers):
    joint = JointWeights.of(layers)
    layers[1].weight.requires_grad_(True)
    assert not joint.runs(layers)
    layers[1].weight.requires_grad_(False)
    assert joint.runs(layers)
    assert not joint.runs([*layers[:2], nn.Linear(5, 6)])


def test_values_set_in_place_are_computed_with(layers):
    joint = JointWeights.of(layers)
    layers[2].weight.mul_(2.0)
    wanted = exact(layers)
    assert joint.runs(layers)
    assert (joint.together(X)[2].double() - wanted[2]).abs().max() < 1e-6


def test_released_weights_lie_apart_with_their_values(layers):
    wanted = [layer.weight.clone() for layer in layers]
    joint = JointWeights.of(layers)
    joint.release()
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 3
    assert all(torch.equal(layer.weight, want) for layer, want in zip(layers, wanted, strict=True))
    assert not joint.runs(layers)


@pytest.mark.parametrize("last_apart", [False, True])
def test_its_gradient_is_the_sum_over_all_layers(layers, last_apart):
    upstream = [torch.randn(3, layer.out_features, generator=torch.Generator().manual_seed(2)) for layer in layers]
    wanted = sum(g.double() @ layer.weight.double() for g, layer in zip(upstream, layers, strict=True))
    x = X.clone().requires_grad_()
    torch.autograd.backward(JointWeights.of(layers, last_apart=last_apart).together(x), upstream)
    assert (x.grad.double() - wanted).abs().max() < 1e-5


def test_only_frozen_plain_layers_of_one_kind_are_joined(layers):
    class Wrapped(nn.Linear):
        pass

    frozen = [layer.requires_grad_(False) for layer in (
        Wrapped(5, 3), nn.Linear(4, 3), nn.Linear(5, 3, bias=False), nn.Linear(5, 3, dtype=torch.float64),
        nn.Linear(5, 3, device="meta"),
    )]  # fmt: skip
    for other in (*frozen, nn.Linear(5, 3)):
        assert JointWeights.of([*layers, other]) is None
    joint = JointWeights.of([nn.Linear(5, width, bias=False).requires_grad_(False) for width in (2, 3)])
    assert joint.bias is None
    assert [part.shape[-1] for part in joint.together(X)] == [2, 3]
