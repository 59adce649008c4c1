"""Small random transformers of each family, what they are called with, and how fused ones are compared with plain."""

import copy

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel

from fdfo_engine.models.lora import ATTENTION_PROJECTIONS, add_lora

FLUX_PROJECTIONS = (*ATTENTION_PROJECTIONS, "single_transformer_blocks.0.attn.to_q")
EVERYWHERE = (
    *ATTENTION_PROJECTIONS, "attn2.to_q", "ff.net.0.proj", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out",
    "img_mod.1", "img_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip
SD3 = {
    "sd3": {},
    "sd35-large": {"qk_norm": "rms_norm"},
    "sd35-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}
FAMILIES = dict.fromkeys(SD3, SD3Transformer2DModel) | {
    "flux": FluxTransformer2DModel, "qwen-image": QwenImageTransformer2DModel,
}  # fmt: skip
VARIANTS = tuple(FAMILIES)
CONTROLNET = dict.fromkeys(VARIANTS, "controlnet_block_samples") | dict.fromkeys(SD3, "block_controlnet_hidden_states")
"""Name of the argument that takes a ControlNet's residuals."""
ATTENTION_KWARGS = dict.fromkeys(VARIANTS, "joint_attention_kwargs") | {"qwen-image": "attention_kwargs"}
"""Name of the argument that takes a LoRA's scale."""


def build(variant, *, seed=0, heads=2, head_size=8, layers=2, single_layers=2):
    """A random float32 model; every weight counts, also those that diffusers starts at zero."""
    torch.manual_seed(seed)
    if variant == "flux":
        axes = tuple(head_size * part // 8 for part in (2, 2, 4))
        model = FluxTransformer2DModel(
            in_channels=16, num_layers=layers, num_single_layers=single_layers, attention_head_dim=head_size,
            num_attention_heads=heads, joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True,
            axes_dims_rope=axes,
        )  # fmt: skip
    elif variant == "qwen-image":
        model = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=head_size, num_attention_heads=heads,
            joint_attention_dim=24, axes_dims_rope=tuple(head_size * part // 8 for part in (2, 2, 4)),
        )  # fmt: skip
    else:
        model = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, num_attention_heads=heads,
            attention_head_dim=head_size, joint_attention_dim=24, caption_projection_dim=heads * head_size,
            pooled_projection_dim=20, pos_embed_max_size=8, **SD3[variant],
        )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn(p.shape) if ".norm_" in name else torch.randn(p.shape) * p.shape[-1] ** -0.5)
    return model.eval()


def adapted(model, targets=ATTENTION_PROJECTIONS, *, rank=4):
    """`model`, frozen, with a LoRA whose B is not zero."""
    model.requires_grad_(False)
    add_lora(model, rank=rank, alpha=2.0 * rank, targets=targets, seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape))
    return model


def inputs(variant, batch=3, *, size=8, text=5, dtype=torch.float32, seed=2):
    """Keyword arguments of a forward."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    given = {"encoder_hidden_states": normal(batch, text, 24), "pooled_projections": normal(batch, 20)}
    times = torch.rand(batch, generator=draw)
    if variant == "qwen-image":  # prompts of different lengths, padded
        del given["pooled_projections"]
        lengths = torch.tensor([max(1, text - 2 * i) for i in range(batch)])
        given["encoder_hidden_states_mask"] = torch.arange(text) < lengths[:, None]
        side = size // 2
        return given | {"hidden_states": normal(batch, side**2, 16), "timestep": times, "img_shapes": (1, side, side)}
    if variant != "flux":
        return {"hidden_states": normal(batch, 4, size, size), "timestep": 1000 * times, **given}
    rows, columns = torch.meshgrid(torch.arange(size // 2), torch.arange(size // 2), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], 2).flatten(0, 1).float()
    return {
        "hidden_states": normal(batch, len(img_ids), 16), "timestep": times, "guidance": torch.full((batch,), 3.5),
        "img_ids": img_ids, "txt_ids": torch.zeros(text, 3), **given,
    }  # fmt: skip


def forward_backward(model, given):
    """Output, and gradients by name, float32, of a random linear function of the output."""
    model.zero_grad()
    out = model(**given, return_dict=False)[0]
    (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    grads = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach().float(), grads


def rms(x):
    return x.double().square().mean().sqrt().item()


def off(actual, exact, scale=None):
    """Relative rms error; an exact zero has to be met to rounding."""
    return rms(actual - exact) / max(rms(exact) if scale is None else scale, 1e-30)


def assert_equal_runs(actual, exact, *, limit=1e-5):
    """Output and every gradient within `limit`, relative; gradients that are zero but for rounding, of the largest."""
    assert off(actual[0], exact[0]) <= limit
    assert actual[1].keys() == exact[1].keys()
    largest = max(rms(g) for g in exact[1].values())
    for name, gradient in exact[1].items():
        floor = 1e-4 * largest
        assert off(actual[1][name], gradient, max(rms(gradient), floor)) <= limit, name


def in_float32(model):
    """The same weights, computed with in float32."""
    return copy.deepcopy(model).float()


def as_float32(given):
    return {name: t.float() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in given.items()}


def assert_as_close(actual, plain, exact, *, factor=1.1):
    """Output, and all gradients together (each in units of its own size), at most `factor` as far off as plain's."""
    assert off(actual[0], exact[0]) <= factor * off(plain[0], exact[0])
    assert actual[1].keys() == exact[1].keys()
    size = max(rms(g) for g in exact[1].values())
    names = [name for name, g in exact[1].items() if rms(g) > 1e-4 * size]
    found, own = ([off(run[1][name], exact[1][name]) ** 2 for name in names] for run in (actual, plain))
    assert sum(found) ** 0.5 <= factor * sum(own) ** 0.5


def handed_over(text):
    """The lines of `text` that say why calls went to diffusers' own blocks."""
    return [line for line in text.splitlines() if line.startswith("model: diffusers' own blocks, not the fused ones: ")]
