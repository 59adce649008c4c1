"""Single blocks at the widths of the real models, with few tokens."""

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from fused_models import assert_equal_runs

from fdfo_engine.models.fused.flux import FusedDoubleBlock, FusedSingleBlock
from fdfo_engine.models.fused.joint_attention import Settings
from fdfo_engine.models.fused.qwen_image import FusedQwenImageBlock
from fdfo_engine.models.fused.sd3 import FusedJointBlock

SD35_MEDIUM = {"dim": 1536, "num_attention_heads": 24, "attention_head_dim": 64, "qk_norm": "rms_norm"}
FLUX = {"dim": 3072, "num_attention_heads": 24, "attention_head_dim": 128}
BLOCKS = {
    "SD3.5-M dual": (JointTransformerBlock, FusedJointBlock, {**SD35_MEDIUM, "use_dual_attention": True}),
    "SD3.5-M": (JointTransformerBlock, FusedJointBlock, SD35_MEDIUM),
    "SD3.5-M last": (JointTransformerBlock, FusedJointBlock, {**SD35_MEDIUM, "context_pre_only": True}),
    "FLUX double": (FluxTransformerBlock, FusedDoubleBlock, FLUX),
    "FLUX single": (FluxSingleTransformerBlock, FusedSingleBlock, FLUX),
    "Qwen-Image": (QwenImageTransformerBlock, FusedQwenImageBlock, FLUX),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_real_width(name):
    family, fused, settings = BLOCKS[name]
    torch.manual_seed(0)
    block = family(**settings)
    image, text, width = 33, 7, settings["dim"]
    tokens = [torch.randn(2, count, width, requires_grad=True) for count in (image, text)]
    temb = torch.randn(2, width)
    angles = torch.rand(image + text, settings["attention_head_dim"] // 2)
    given = {"hidden_states": tokens[0], "encoder_hidden_states": tokens[1], "temb": temb}
    if name.startswith("FLUX"):
        both = angles.repeat_interleave(2, 1)
        given["image_rotary_emb"] = both.cos(), both.sin()
    elif name == "Qwen-Image":
        given["image_rotary_emb"] = torch.polar(torch.ones_like(angles), angles).split([image, text])
        given["encoder_hidden_states_mask"] = torch.arange(text) < torch.tensor([[text], [text - 3]])

    def run(forward):
        block.zero_grad()
        for x in tokens:
            x.grad = None
        found = [x for x in forward(**given) if x is not None]
        sum((x * torch.linspace(-1, 1, width)).sum() for x in found).backward()
        grads = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
        grads |= {f"tokens {i}": x.grad.clone() for i, x in enumerate(tokens)}
        return torch.cat(found, 1).detach(), grads

    exact = run(block)
    assert_equal_runs(run(fused(block, Settings("auto", False, True)).forward), exact)
