"""One call of the network for a batch, with or without classifier-free guidance."""

from torch import Tensor, cat

from fdfo_engine.models.flow_model import Conditioning, FlowModel, Network
from fdfo_engine.runtime import pulse


def predict(
    model: FlowModel,
    network: Network,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Velocities with the prompt and, where `negative` is given, without it; both `[N, C, H, W]`, model dtype.

    Both come from one batch, the unconditional half first, as diffusers' pipelines do it. A family with a guidance
    rule of its own has applied it: then the first is guided, and there is no second.
    """
    pulse.got_on()
    if negative is None:
        return model.velocity(network, latents, timesteps, conditioning), None
    both = model.velocity(
        network, cat([latents, latents]), cat([timesteps, timesteps]), Conditioning.cat([negative, conditioning])
    )
    v_uncond, v = both.chunk(2)
    return model.guided(v, v_uncond, guidance_scale)
