"""One epoch in float64, written from METHOD: shares diffusers' blocks with the engine, nothing else."""

import copy
import functools

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from ops import exact

DEAL = 2**31 + 1


def dealt_steps(pair, branch, *, steps, kept, shares, seed):
    """Solver steps of one sample for each optimiser step, a list of sets."""
    words = [exact.words((i, DEAL + branch, pair % 2**32, pair // 2**32), (seed % 2**32, seed // 2**32))[0]
             for i in range(steps)]  # fmt: skip
    order = np.argsort(words, kind="stable")[:kept]
    return [set(part.tolist()) for part in np.split(order, shares)]


class EpochOracle:
    """The tiny pipeline in float64, a LoRA of our own on it, and a hand-written AdamW."""

    def __init__(self, config, weights):
        self.config = config
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(config.model.id, torch_dtype=torch.float64)
        self.network = self.pipeline.transformer.requires_grad_(False)
        self.untrained = copy.deepcopy(self.network)
        self.weights = {name: w.double().requires_grad_() for name, w in weights.items()}
        if config.model.train == "full":
            own = dict(self.network.named_parameters())
            for name, weight in self.weights.items():
                own[name].data = weight.data
                self.weights[name] = own[name].requires_grad_()
        else:
            self._hook_lora()
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        self.applied = 0
        self.pipeline.scheduler.set_timesteps(config.sampling.steps)
        self.sigmas = self.pipeline.scheduler.sigmas.double().tolist()
        self.grad_norms = []

    def _hook_lora(self):
        scale = self.config.lora.alpha / self.config.lora.rank
        for name, a in self.weights.items():
            if ".lora_A." in name:
                b = self.weights[name.replace("lora_A", "lora_B")]

                def add(_module, inputs, output, a=a, b=b):
                    return output + scale * (inputs[0] @ a.T) @ b.T

                self.network.get_submodule(name.split(".lora_A")[0]).register_forward_hook(add)

    @functools.cache  # noqa: B019 - the oracle lives as long as its test
    def _text(self, prompt):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False,
            max_sequence_length=self.config.model.max_sequence_length,
        )  # fmt: skip
        return embeds, pooled

    def velocity(self, x, step, prompt, network=None):
        """Guided velocity of one latent `[C, H, W]`."""
        network = network or self.network
        w = self.config.sampling.guidance_scale

        def plain(text):
            embeds, pooled = self._text(text)
            time = self.pipeline.scheduler.timesteps[step].expand(1)
            return network(x[None], embeds, pooled, time, return_dict=False)[0][0]

        if w == 1.0:
            return plain(prompt)
        negative = plain("")
        return negative + w * (plain(prompt) - negative)

    @torch.no_grad()
    def sample(self, prompts):
        """Trajectories of pairs 0..P-1, raw churn: latents `[P][2][T + 1]` and velocities `[P][2][T]`."""
        T, seed, gamma = self.config.sampling.steps, self.config.run.seed, self.config.sampling.churn.weight
        shape = (4, 8, 8)
        self.x, self.v = [], []
        for pair, prompt in enumerate(prompts):
            xs, vs = [], []
            for branch in range(2):
                x = exact.prior(shape, seed=seed, pair=pair, branch=branch, gamma=gamma)
                path, velocities = [x], []
                for i in range(T):
                    v = self.velocity(torch.from_numpy(x), i, prompt).numpy()
                    eps = exact.noise(shape, seed=seed, pair=pair, stream=3 + 2 * i + branch)
                    g = gamma if i + 1 < T else 0.0
                    x = exact.step(x, v, t=self.sigmas[i], s=self.sigmas[i + 1], gamma=g, eps=eps)
                    path.append(x)
                    velocities.append(v)
                xs.append(path)
                vs.append(velocities)
            self.x.append(xs)
            self.v.append(vs)
        self.prompts = prompts

    @torch.no_grad()
    def images(self):
        """`[P, 2, 3, H, W]` of the final latents."""
        vae = self.pipeline.vae
        latents = torch.from_numpy(np.array([[path[-1] for path in pair] for pair in self.x])).flatten(0, 1)
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1).unflatten(0, (-1, 2))

    def update(self, rewards):
        """All optimiser steps of the epoch; `rewards` `[P][2]`, NaN for no opinion."""
        settings, T = self.config.update, self.config.sampling.steps
        kept, shares = settings.train_steps or T, settings.optimizer_steps
        self.loss = 0.0
        for share in range(shares):
            loss = self._loss(rewards, share, kept, shares)
            self.loss += loss.item() / shares
            gradients = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
            self._adamw(dict(zip(self.weights, gradients, strict=True)))

    def _loss(self, rewards, share, kept, shares):
        P, T, seed = len(self.x), self.config.sampling.steps, self.config.run.seed
        update = self.config.update
        c, kl_weight, hinge = update.clip_range, update.kl_weight, update.velocity_hinge
        B = 2 * P * kept // shares
        total = 0.0
        for pair in range(P):
            a, b = (self.x[pair][branch][-1] for branch in range(2))
            d = (a - b) / 2
            u = d / ((d**2).mean() + 1e-6)
            A = (rewards[pair][0] - rewards[pair][1]) / 2
            for branch, sign in ((0, 1.0), (1, -1.0)):
                for i in dealt_steps(pair, branch, steps=T, kept=kept, shares=shares, seed=seed)[share]:
                    if np.isnan(A) and not kl_weight and not hinge:
                        continue
                    x, v_old = (torch.from_numpy(t[pair][branch][i]) for t in (self.x, self.v))
                    v, signed = self.velocity(x, i, self.prompts[pair]), torch.from_numpy(sign * u)
                    if not np.isnan(A):
                        log_ratio = (signed**2).mean() - ((v - (v_old - signed)) ** 2).mean()
                        rho = log_ratio.exp()
                        total = total + (-sign * A * rho + abs(A) / (2 * c) * (rho - 1) ** 2) / B
                    if kl_weight or hinge:
                        with torch.no_grad():
                            base = self.velocity(x, i, self.prompts[pair], self.untrained)
                        growth = ((v**2).mean() / (base**2).mean()).sqrt() - 1
                        penalty = kl_weight * ((v - base) ** 2).mean() + hinge * growth.clamp_min(0) ** 2
                        total = total + penalty / B
        return total

    @torch.no_grad()
    def _adamw(self, gradients):
        o = self.config.optimizer
        gradients = {n: torch.zeros_like(self.weights[n]) if g is None else g for n, g in gradients.items()}
        norm = sum((g**2).sum() for g in gradients.values()).sqrt()
        self.grad_norms.append(norm.item())
        self.applied += 1
        for name, weight in self.weights.items():
            g = gradients[name] * min(1.0, o.max_grad_norm / (norm + 1e-6))
            m, v = self.moments[name]
            m.mul_(o.betas[0]).add_((1 - o.betas[0]) * g)
            v.mul_(o.betas[1]).add_((1 - o.betas[1]) * g**2)
            m_hat, v_hat = m / (1 - o.betas[0] ** self.applied), v / (1 - o.betas[1] ** self.applied)
            weight.mul_(1 - o.lr * o.weight_decay).sub_(o.lr * m_hat / (v_hat.sqrt() + o.eps))
