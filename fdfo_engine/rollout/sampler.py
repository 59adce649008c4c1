"""Samples images: pairs that share their noise for training, single ones without churn for looking at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdfo_engine.config import Config
from fdfo_engine.models.finite import blame, require_finite_images
from fdfo_engine.models.flow_model import Conditioning, FlowModel, Grid, Network
from fdfo_engine.models.guidance import predict
from fdfo_engine.models.prompt_cache import PromptCache
from fdfo_engine.ops import GENERATION_STREAM, guided_velocity, moved, paired_noise, paired_step, philox_normal
from fdfo_engine.rollout.plan import SamplingPlan
from fdfo_engine.runtime.distributed import max_over_ranks, together
from fdfo_engine.runtime.errors import NumericsError
from fdfo_engine.runtime.progress import Progress
from fdfo_engine.trajectory.renoised import Renoising

DECODE_IMAGES = 4
"""Images that the VAE decodes at once, whatever the block: it takes more memory an image than the network does."""


@dataclass(frozen=True)
class SampledBlock:
    """One block of P pairs: final latents and images `[P, 2, ...]`, velocities `[P, 2, T, C, H, W]`, their churn."""

    latents: Tensor
    images: Tensor
    velocities: Tensor
    gammas: Tensor


class PairedSampler:
    """Samples blocks of pairs and churn-free images from a flow model. Draws no random state: see METHOD on noise."""

    def __init__(
        self, model: FlowModel, prompts: PromptCache, config: Config, plan: SamplingPlan, backend: str
    ) -> None:
        """`plan` is the algorithm's; `backend` runs the pair ops (`ops.backend_for`)."""
        self.plan = plan
        self._model = model
        self._prompts = prompts
        self._sampling = config.sampling
        self._negative_prompt = config.model.negative_prompt
        self._seed = config.run.seed
        self._backend = backend
        self.grid = model.grid(config.sampling.steps)

    @torch.no_grad()
    def sample_block(self, network: Network, prompts: Sequence[str], pair_ids: Sequence[int]) -> SampledBlock:
        """Runs both branches of every pair through the whole grid, as one batch.

        Raises:
            NumericsError: a velocity or an image was not finite; names the pair and the branch, and of a velocity the
                step.
        """
        model, grid, pairs, guidance = self._model, self.grid, len(pair_ids), self._sampling.guidance_scale
        gammas = self.plan.gammas(grid.sigmas, pair_ids)
        sigmas, ids = grid.sigmas.tolist(), moved(torch.tensor(pair_ids), model.device)
        timesteps_T = moved(grid.timesteps, model.device)
        conditioning, negative = self.conditioning(prompts, copies=2)
        x_PKCHW = paired_noise(
            ids,
            model.latent_shape,
            seed=self._seed,
            gamma=gammas[:, 0],
            device=model.device,
            solver=self.plan.solver,
            backend=self._backend,
        )
        velocities = torch.empty(
            pairs, 2, grid.steps, *model.latent_shape, dtype=model.dtype, device=model.device
        )  # PKTCHW
        for i in range(grid.steps):
            timesteps = timesteps_T[i].expand(2 * pairs)
            v, v_uncond = predict(model, network, x_PKCHW.flatten(0, 1), timesteps, conditioning, negative, guidance)
            x_PKCHW = paired_step(
                x_PKCHW,
                v.reshape(x_PKCHW.shape),
                v_uncond=None if v_uncond is None else v_uncond.reshape(x_PKCHW.shape),
                guidance_scale=guidance,
                sigma=sigmas[i],
                sigma_next=sigmas[i + 1],
                gamma=gammas[:, i + 1],
                step=i,
                v_out=velocities[:, :, i],
                inplace=True,
                seed=self._seed,
                pair_ids=ids,
                solver=self.plan.solver,
                backend=self._backend,
            )
        self._check_latents(x_PKCHW, velocities, pair_ids)
        names = [f"pair {pair}, branch {branch}" for pair in pair_ids for branch in range(2)]
        images = torch.stack(list(self._decode(x_PKCHW.flatten(0, 1), names).chunk(pairs)))
        if self.plan.renoised_steps is not None:
            steps_PKS = self.plan.renoised_steps(pair_ids)
            self._look_again(network, x_PKCHW, pair_ids, steps_PKS, (conditioning, negative), out=velocities.zero_())
        return SampledBlock(x_PKCHW, images, velocities, gammas)

    def _look_again(
        self,
        network: Network,
        x_PKCHW: Tensor,
        pair_ids: Sequence[int],
        steps_PKS: Tensor,
        conditioning: tuple[Conditioning, Conditioning | None],
        out: Tensor,
    ) -> None:
        """Writes the velocities at the final latents, noised again, to `out` `[P, 2, T, C, H, W]`."""
        renoising = Renoising(self.grid.sigmas, self._seed, self._backend)
        ids, branch = torch.tensor(pair_ids).repeat_interleave(2), torch.arange(2).repeat(len(pair_ids))
        finals, out_RT = x_PKCHW.flatten(0, 1), out.flatten(0, 1)
        rows = torch.arange(len(ids), device=finals.device)
        guidance = self._sampling.guidance_scale
        for step in steps_PKS.flatten(0, 1).unbind(-1):
            x = renoising.latents(finals, ids, branch, step)
            v, v_uncond = predict(self._model, network, x, self.grid.timesteps[step], *conditioning, guidance)
            out_RT[rows, moved(step, finals.device)] = guided_velocity(v, v_uncond, guidance)

    @torch.no_grad()
    def generate_batch(
        self,
        network: Network,
        prompts: Sequence[str],
        indices: Sequence[int],
        *,
        seed: int,
        grid: Grid,
        guidance: float,
    ) -> Tensor:
        """Images `[N, 3, height, width]` in 0..1 by plain Euler; noise is keyed by (seed, index of the image).

        Raises:
            NumericsError: a velocity or an image was not finite; names the image.
        """
        model = self._model
        conditioning, negative = self.conditioning(prompts, guidance=guidance)
        x_NCHW = philox_normal(
            model.latent_shape,
            seed=seed,
            pair_ids=indices,
            stream=GENERATION_STREAM,
            device=model.device,
            backend=self._backend,
        )
        was_finite = []
        moves_T, timesteps_T = (moved(t, model.device) for t in (grid.sigmas.diff(), grid.timesteps))
        for i in range(grid.steps):
            timesteps = timesteps_T[i].expand(len(prompts))
            v, v_uncond = predict(model, network, x_NCHW, timesteps, conditioning, negative, guidance)
            v = guided_velocity(v, v_uncond, guidance)
            was_finite.append(torch.isfinite(v).flatten(1).all(1))
            x_NCHW = x_NCHW + moves_T[i] * v.float()
        bad = (~torch.stack(was_finite)).nonzero()  # asked once, after the loop: a question waits for the GPU
        if len(bad):
            step, row = bad[0].tolist()
            raise NumericsError(f"velocity is not finite first at image {indices[row]}, step {step}{blame(model)}")
        return self._decode(x_NCHW, [f"image {index}" for index in indices])

    def _decode(self, latents: Tensor, names: Sequence[str]) -> Tensor:
        """A few at a time, always as many."""
        starts = range(0, len(latents), DECODE_IMAGES)
        images = torch.cat([self._model.decode(latents[start : start + DECODE_IMAGES]) for start in starts])
        require_finite_images(self._model, images, names)
        return images

    def warm(self, prompts: Sequence[str], progress: Progress) -> None:
        """Encodes `prompts` ahead of `sample_block`, all in one go; collective."""
        if missing := max_over_ranks(len(self._prompts.missing(prompts))):
            with progress.phase("prompts", total=missing, unit="prompts") as phase:
                phase.reach(0)
                together(lambda: self._prompts.warm(prompts, phase.advance))

    def tell_cut(self, prompts: Sequence[str]) -> None:
        """See `PromptCache.tell_cut`."""
        self._prompts.tell_cut(prompts)

    def conditioning(
        self, prompts: Sequence[str], *, copies: int = 1, guidance: float | None = None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Rows of the prompts, each repeated `copies` times, and as many of the negative prompt where guidance != 1."""
        repeated = [prompt for prompt in prompts for _ in range(copies)]
        positive = self._prompts.encode(repeated)
        if (self._sampling.guidance_scale if guidance is None else guidance) == 1.0:
            return positive, None
        return positive, self._prompts.encode([self._negative_prompt] * len(repeated))

    def _check_latents(self, latents: Tensor, velocities: Tensor, pair_ids: Sequence[int]) -> None:
        if torch.isfinite(latents).all():
            return
        where = (~torch.isfinite(velocities.flatten(3)).all(-1)).nonzero()
        if len(where) == 0:
            raise NumericsError("a latent overflowed though every velocity was finite; check sampling.churn")
        pair, branch, step = where[where[:, 2].argmin()].tolist()
        raise NumericsError(
            f"velocity is not finite first at pair {pair_ids[pair]}, branch {branch}, step {step}{blame(self._model)}"
        )
