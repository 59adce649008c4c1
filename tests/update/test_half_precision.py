"""Training in float16: gradients of the size that real runs have, against float32 and bfloat16."""

import pytest
import torch
from tiny_flux import build_tiny_flux
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.runtime.errors import UsageError
from fdfo_engine.update.half_precision import GradientScale

REWARDS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.2], [1.0, 0.0]])
REAL_RUN = 2.0**-22
"""How much smaller the paper's gradients of a velocity are: 65,536 elements and 8,640 items here are 256 and 32."""


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("flux"))


def gradient_of(folder, run_dir, dtype, *, scale=1.0, fused=True, **sections):
    """The gradient of a whole epoch at `scale` times the rewards, of weights that moved; and the metrics."""
    update = {"optimizer_steps": 1, "micro_batch": 12, **sections.pop("update", {})}
    model = {"dtype": dtype, "fused": fused, **sections.pop("model", {})}
    engine = Engine(tiny_config(folder, run_dir, model=model, update=update, **sections))
    generator = torch.Generator().manual_seed(3)
    weights = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in engine.trainer.weights().items()}
    engine.trainer.load(weights, engine.trainer.state())
    found, step = {}, engine.trainer.step

    def looked_at():
        found.update(engine.trainer.gradients())
        return step()

    engine.trainer.step = looked_at
    metrics = engine.update(engine.rollout(PROMPTS), scale * REWARDS)
    return torch.cat([g.flatten() for g in found.values()]).double() / scale, metrics


def distance(one, exact):
    return ((one - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("sd3", True),
        pytest.param("sd3", False, marks=pytest.mark.slow),
        pytest.param("flux", True, marks=pytest.mark.slow),
    ],
)
def test_float16_is_nearer_to_float32_than_bfloat16(request, tmp_path, kind, fused):
    """By a factor of 3 at least, of the gradient of a guided run: float16 has three more bits."""
    folder = request.getfixturevalue(f"tiny_{kind}")
    sampling = {"guidance_scale": 4.5}
    exact, half, brain = (
        gradient_of(folder, tmp_path / dtype, dtype, fused=fused, sampling=sampling)[0]
        for dtype in ("float32", "float16", "bfloat16")
    )
    assert distance(half, exact) < distance(brain, exact) / 3
    assert distance(half, exact) < 0.05


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_as_small_as_a_real_runs_do_not_vanish(tiny_sd3, tmp_path, stage):
    """In a backward pass in plain float16 most of them are 0."""
    zero = {"stage": stage}
    exact, plain = gradient_of(tiny_sd3, tmp_path / "a", "float32", zero=zero)
    small, metrics = gradient_of(tiny_sd3, tmp_path / "b", "float16", scale=REAL_RUN, zero=zero)
    assert distance(small, exact) < 0.02
    assert metrics["grad_norm"] == pytest.approx(REAL_RUN * plain["grad_norm"], rel=0.02)
    assert metrics["skipped_steps"] == 0


def test_a_kl_term_is_scaled_with_the_loss(tiny_sd3, tmp_path):
    kl = {"update": {"kl_weight": 1e-6}}
    exact, _ = gradient_of(tiny_sd3, tmp_path / "a", "float32", scale=1e-6, **kl)
    found, metrics = gradient_of(tiny_sd3, tmp_path / "b", "float16", scale=1e-6, **kl)
    assert metrics["kl"] > 0
    assert distance(found, exact) < 0.02


def test_the_scale_is_a_power_of_two_for_each_backward():
    """Of y = 2 x, whatever the size of the gradient that comes in; none at all stays none."""
    weight = torch.nn.Parameter(torch.ones(3))
    scale, seen = GradientScale([weight], torch.device("cpu")), []
    for upstream in (torch.tensor([3e-12, 1e-11, 0.0]), torch.tensor([5e8, -1e9, 1.0]), torch.zeros(3)):
        weight.grad = None
        half = (2 * weight).half()
        half.register_hook(lambda g: seen.append(g))
        scale.widened(half).backward(upstream)
        assert torch.allclose(weight.grad, 2 * upstream, rtol=2**-10, atol=0 if upstream.any() else 1)
        assert upstream.any() == weight.grad.any()
        exact = upstream.abs().max()
        if exact:
            assert 32 <= seen[-1].abs().max() <= 64  # of 65504 and 6e-8, where float16 ends
            factor = (weight.grad[upstream.abs().argmax()] / 2 / seen[-1][upstream.abs().argmax()].float()).item()
            assert torch.tensor(factor).log2().item().is_integer()


def test_full_training_in_float16_is_refused(tiny_sd3, tmp_path):
    with pytest.raises(UsageError, match=r"model\.dtype = float16: .* model\.train = full takes bfloat16 or float32"):
        Engine(tiny_config(tiny_sd3, tmp_path, model={"dtype": "float16", "train": "full"}))


def test_what_is_not_finite_stays_so():
    weight = torch.nn.Parameter(torch.ones(2))
    GradientScale([weight], torch.device("cpu")).widened(weight.half()).backward(torch.tensor([1.0, float("nan")]))
    assert not torch.isfinite(weight.grad).all()
