"""CUDA graphs of the network. Without a GPU `rerun` stands in for them: what a graph would replay, it runs again."""

from functools import partial

import pytest
import torch
from tiny_sd3 import PROMPTS, tiny_config
from torch import nn

from fdfo_engine import Engine
from fdfo_engine.models.graphed import GraphedNetwork, GraphedTraining, cuda_graphs, graph_refusals
from fdfo_engine.update import networks

CUDA = torch.device("cuda")


def rerun(*parts):
    """As a graph does, gradients are written where those of the first run lie."""
    for part in parts:
        part()
    step = parts[0].__self__
    first = getattr(step, "_gradients", ())

    def backward():
        parts[1]()
        for place, gradient in zip(first, step._gradients, strict=True):
            if place is not None:
                place.copy_(gradient)
        step._gradients = first

    return (*parts[:1], backward)[: len(parts)]


@pytest.mark.parametrize(
    ("device", "stage", "is_compiled", "checkpoints", "says"),
    [
        (torch.device("cpu"), 1, False, False, "the model is on cpu"),
        (CUDA, 3, False, False, "zero.stage 3"),
        (CUDA, 0, True, False, "model.compile"),
        (CUDA, 0, False, True, "model.gradient_checkpointing"),
    ],
)
def test_each_refusal_has_its_reason(device, stage, is_compiled, checkpoints, says):
    reasons = graph_refusals(device, zero_stage=stage, is_compiled=is_compiled, checkpoints=checkpoints)
    assert len(reasons) == 1
    assert says in reasons[0]


def test_it_fits_on_a_gpu_at_the_other_stages():
    for stage in (0, 1, 2):
        assert graph_refusals(CUDA, zero_stage=stage, is_compiled=False, checkpoints=False) == []


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CAPTURES = [
    pytest.param("cpu", rerun, id="stand-in"), pytest.param("cuda", cuda_graphs, id="graph", marks=GPU)
]  # fmt: skip


@pytest.mark.parametrize(("device", "capture"), CAPTURES)
def test_a_replay_is_the_network_with_the_weights_of_the_moment(device, capture):
    torch.manual_seed(0)
    linear = nn.Linear(8, 8, device=device)
    graphed = GraphedNetwork(lambda *, x, shift: (linear(x) + shift,), capture)
    for rows in (4, 4, 2):
        x = torch.randn(rows, 8, device=device)
        (kept,) = graphed(x=x, shift=1.0)
        expected = linear(x) + 1.0
        with torch.no_grad():
            linear.weight.mul_(2)
        (after,) = graphed(x=x, shift=1.0)
        assert torch.equal(kept, expected)
        assert torch.equal(after, linear(x) + 1.0)


@pytest.mark.parametrize(("device", "capture"), CAPTURES)
def test_gradients_of_several_micro_batches_are_summed(device, capture):
    """Into `.grad`, with the weights of the moment; None for a weight that is not used."""
    torch.manual_seed(0)
    linear, idle = nn.Linear(8, 8, device=device), nn.Parameter(torch.ones(3, device=device))
    plain = nn.Linear(8, 8, device=device)
    plain.load_state_dict(linear.state_dict())

    def network(layer, *, x, shift):
        return (torch.tanh(layer(x)) + shift,)

    graphed = GraphedTraining(partial(network, linear), linear, [*linear.parameters(), idle], capture)
    for _ in range(2):
        for rows in (4, 4, 2):
            x = torch.randn(rows, 8, device=device)
            for run, layer in ((graphed, linear), (partial(network, plain), plain)):
                (y,) = run(x=x, shift=1.0)
                (y.square().sum() * layer.weight.sum().detach()).backward()
        for one, other in zip(linear.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
            with torch.no_grad():
                one.mul_(0.5)
                other.mul_(0.5)
    assert idle.grad is None


def test_a_capture_touches_no_accumulator_of_the_parameters_own():
    """Those belong to the stream that first used a parameter, which a capture may not wait for."""
    linear, seen = torch.nn.Linear(3, 2), []
    own = list(linear.parameters())

    def network(*, x):
        out = linear(x)
        seen.extend(node.variable for node, _ in out.grad_fn.next_functions if hasattr(node, "variable"))
        seen.append(linear.bias)
        return (out,)

    graphed = GraphedTraining(network, linear, own, rerun)
    (out,) = graphed(x=torch.ones(4, 3))
    out.sum().backward()
    assert linear.bias.grad.equal(torch.full((2,), 4.0))
    assert not {id(variable) for variable in seen} & {id(parameter) for parameter in own}
    assert all(variable.data_ptr() in {p.data_ptr() for p in own} for variable in seen)
    assert [id(parameter) for parameter in linear.parameters()] == list(map(id, own))


def test_a_backward_after_another_forward_is_a_bug():
    linear = nn.Linear(2, 2)
    graphed = GraphedTraining(lambda *, x: (linear(x),), linear, list(linear.parameters()), rerun)
    (first,), _ = graphed(x=torch.ones(1, 2)), graphed(x=torch.ones(1, 2))
    with pytest.raises(AssertionError, match="another forward"):
        first.sum().backward()


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2))])
def test_an_epoch_through_graphs_is_the_epoch(tiny_sd3, tmp_path, stage, monkeypatch):
    """Through DeepSpeed, over whole micro-batches and smaller ones; to the bit."""
    called = []

    def training(*arguments):
        graphed = GraphedTraining(*arguments, rerun)
        return lambda **inputs: called.append(len(inputs["hidden_states"])) or graphed(**inputs)

    sections = {"zero": {"stage": stage}, "update": {"optimizer_steps": 2, "micro_batch": 3}}
    weights = []
    for graphs in (False, True):
        if graphs:
            monkeypatch.setattr(networks, "graph_refusals", lambda *_, **__: [])
            monkeypatch.setattr(networks, "GraphedTraining", training)
            monkeypatch.setattr(networks, "GraphedNetwork", partial(GraphedNetwork, capture=rerun))
        config = tiny_config(tiny_sd3, tmp_path / str(graphs), model={"cuda_graphs": graphs}, **sections)
        engine = Engine(config)
        rewards = torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.25, 0.5], [1.0, 1.0]])
        for _ in range(2):
            engine.update(engine.rollout(PROMPTS), rewards)
        weights.append(engine.trainer.weights())
    assert set(called) == {3}
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
