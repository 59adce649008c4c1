"""The formulas against what torch counts in a run of the network."""

import dataclasses

import pytest
import torch
from tiny_sd3 import tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention_ops, counts
from fdfo_engine.bench.architectures import architectures
from fdfo_engine.bench.flops import flops
from fdfo_engine.config import load_config
from fdfo_engine.models.registry import load_model

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20}
BATCH = 3
CPU = torch.device("cpu")


def test_text_tokens_are_what_the_shipped_configs_train_with(tiny_sd3, tmp_path):
    """77 of CLIP and 128 of T5: as many as a pipeline makes of a prompt at that setting."""
    settings = load_config("sd35m_pickscore").model
    model = load_model(
        tiny_config(tiny_sd3, tmp_path, model={"max_sequence_length": settings.max_sequence_length}), CPU
    )
    found = model.encode_prompt("").tensors["encoder_hidden_states"].shape[1]
    assert found == 205 == counts.TEXT == attention_ops.TEXT_TOKENS
    assert {architectures()[name].text_tokens for name in ("sd35-medium", "sd35-large")} == {205}
    assert architectures()["flux1-dev"].text_tokens == load_config("flux1_dev").model.max_sequence_length == 512


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
