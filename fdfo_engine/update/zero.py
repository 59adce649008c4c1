"""Training through DeepSpeed ZeRO: the only file that knows DeepSpeed.

The recipe (no `bf16` section, client AdamW, gradients summed and scaled by us, non-finite gradients caught before the
step) is the one that is exact at every stage; DESIGN.md says which others are silently wrong. Underscored names of
DeepSpeed are used here only, and `tests/update/test_zero.py` notices when one of them changes its meaning.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fdfo_engine.config import OptimizerConfig, ZeroConfig
from fdfo_engine.runtime.distributed import any_rank, launcher_environment, rank, world_size
from fdfo_engine.runtime.split_weights import num_values
from fdfo_engine.update.deepspeed_settings import deepspeed_config, import_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")
_AT_STAGE_3: WeakSet[ZeroTrainer] = WeakSet()
"""Trainers not closed yet whose weights are split over the ranks."""

_CHUNK = 1 << 24
"""Weights that are looked at together: what is counted in eight bytes would else be a copy of all of them."""

_KEPT = -1
"""A module that is none of DeepSpeed's numbers: a weight that it uses stays gathered."""


class ZeroTrainer:
    """Wraps a network for training at a ZeRO stage, and gives its state by parameter name, whole and in float32.

    Every method but `step_count` and `weight_bits` is collective: all ranks call it, in the same order.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        optimizer: OptimizerConfig,
        zero: ZeroConfig,
    ) -> None:
        deepspeed = import_deepspeed()
        self.stage, self._offloads = zero.stage, zero.offload_optimizer
        self._parameters = dict(parameters)
        adamw = torch.optim.AdamW(
            self._parameters.values(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=zero.offload_optimizer or None,  # one pass over host memory instead of ten
        )
        if zero.stage == 3:
            # DeepSpeed puts a linear of its own in place of torch's, which other models of the process would run too
            self._linear: Callable[..., Tensor] = next(
                (each._linear for each in _AT_STAGE_3), torch.nn.functional.linear
            )
            _AT_STAGE_3.add(self)
        values = sum(p.numel() for p in self._parameters.values())
        settings = deepspeed_config(optimizer, zero, values)
        with launcher_environment():
            self.engine: Any = deepspeed.initialize(
                model=network, optimizer=adamw, config=settings, dist_init_required=False
            )[0]
        self._allocate_moments()
        if zero.stage == 3:
            self._pass_over_unused()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The network's forward, through DeepSpeed: at stage 3 calling the bare module would be wrong."""
        if self.stage == 3:
            os.environ.setdefault("LOCAL_RANK", "0")  # asked for in the course of each step; a launcher has set it
        output: tuple[Tensor, ...] = self.engine(*args, **kwargs)
        return output

    def close(self) -> None:
        """Takes DeepSpeed's hooks off: from C++ they hold optimizer and network for the life of the process."""
        self.engine.destroy()
        if self.stage == 3:
            self._close_stage_3()

    def _close_stage_3(self) -> None:
        stack: list[Any] = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
        own = set(map(id, self.engine.module.modules()))
        stack[:] = [module for module in stack if id(module) not in own]  # it remembers whose forward ran last
        # after a forward the modules live on all the same: what they weigh is given back
        nothing = torch.empty(0)
        for parameter in self.engine.module.parameters():
            parameter.data = parameter.ds_tensor.data = nothing
        for master in self._masters():
            master.data = nothing
        self._inner.state.clear()
        _AT_STAGE_3.discard(self)
        if not _AT_STAGE_3:
            torch.nn.functional.linear = self._linear

    @contextmanager
    def forward_by(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within this context the network's own forward is `forward`; what DeepSpeed hangs on a call still runs."""
        module = self.engine.module
        own = module.__dict__.get("forward")  # fused transformers have one of their own
        module.forward = forward
        try:
            yield
        finally:
            del module.forward
            if own is not None:
                module.forward = own

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of the network."""
        self.engine.train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates the gradient of one micro-batch; `last` closes the optimiser step's accumulation.

        `loss` is already divided by the items of the whole optimiser step over all ranks: gradients are summed.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if last and self.stage == 3 and world_size() > 1:
            self._undo_average()

    def step(self) -> tuple[float, bool]:
        """Clips and applies the accumulated gradient; returns its norm before clipping, and whether it was applied.

        A gradient that is not finite on any rank is dropped on all: weights and moments keep their bits.
        """
        norm = self._gradient_norm()
        if any_rank(not math.isfinite(norm) or norm < 0):
            self.discard_gradients()
            return norm, False
        self.engine.step()
        return norm, True

    @contextmanager
    def learning_rate(self, lr: float | None) -> Iterator[None]:
        """Within this context steps take `lr`; None leaves the settings'."""
        groups = self._inner.param_groups
        own = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] if lr is None else lr
        try:
            yield
        finally:
            for group, rate in zip(groups, own, strict=True):
                group["lr"] = rate

    def gradients(self) -> dict[str, Tensor]:
        """The accumulated, unclipped gradient by name, float32 on the CPU; between `backward(last=True)` and `step`."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).float().cpu().clone() for name, p in self._parameters.items()}

    def weights(self, *, only_main: bool = False) -> dict[str, Tensor]:
        """The float32 master weights by name, on the CPU; `only_main` leaves all ranks but 0 with nothing to hold."""
        return self._collected(((name, p, None) for name, p in self._parameters.items()), only_main)

    def state(self, *, only_main: bool = False) -> dict[str, Tensor]:
        """AdamW's moments and step count: `NAME.exp_avg`, `NAME.exp_avg_sq`, `step`; float32 on the CPU."""
        every = ((f"{name}.{m}", p, m) for name, p in self._parameters.items() for m in MOMENTS)
        return self._collected(every, only_main) | {"step": torch.tensor(float(self.step_count))}

    def _collected(self, parts: Iterable[tuple[str, nn.Parameter, str | None]], only_main: bool) -> dict[str, Tensor]:
        kept = {}
        for name, parameter, moment in parts:
            value = self._full(parameter, moment)  # collective, one at a time
            if rank() == 0 or not only_main:
                kept[name] = value
        return kept

    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Puts back what `weights` and `state` gave, bit for bit at an equal number of ranks."""
        for name, parameter in self._parameters.items():
            self._set_full(parameter, weights[name], None)
            for moment in MOMENTS:
                self._set_full(parameter, state[f"{name}.{moment}"], moment)
        for slot in self._inner.state.values():
            slot["step"].fill_(state["step"].item())
        self._publish_weights()

    @property
    def step_count(self) -> int:
        """Optimiser steps applied so far."""
        return int(max((slot["step"].item() for slot in self._inner.state.values()), default=0))

    def weight_bits(self) -> int:
        """A sum over the bits of this rank's master weights: another one once a weight has changed."""
        masters = [master.detach().flatten() for master in self._masters()]
        whole = [master.view(torch.int32 if master.element_size() == 4 else torch.int16) for master in masters]
        sums = [part.sum(dtype=torch.int64) for bits in whole for part in bits.split(_CHUNK)]
        return int(torch.stack(sums).sum())

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within this context stage 3 gathers no weight again: every rank holds all of them, frozen ones too."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        parameters: list[Any] = list(self.engine.module.parameters())
        with GatheredParameters(parameters):
            for parameter in parameters:  # what a module still uses is not released after the call of another
                parameter.ds_active_sub_modules.add(_KEPT)
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(_KEPT)

    @property
    def num_values(self) -> int:
        """Trained values, over all ranks."""
        return sum(map(num_values, self._parameters.values()))

    @property
    def weight_bytes(self) -> int:
        """What whole weights take on a rank, frozen ones too."""
        return sum(num_values(p) * p.element_size() for p in self.engine.module.parameters())

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The network's own forward, below what DeepSpeed hangs on a call; see `forward_by`."""
        forward: Callable[..., Any] = self.engine.module.forward
        return forward

    @contextmanager
    def weights_swapped(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Within this context the network computes with `weights`; its own come back after, bit for bit."""
        with self._gathered():
            own = {name: p.detach().clone() for name, p in self._parameters.items()}
            self._copy(weights)
        try:
            yield
        finally:
            with self._gathered():
                self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self._parameters.values()), modifier_rank=0):
            yield

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW that holds the moments, on flat partitions from stage 1 on."""
        optimizer: torch.optim.Optimizer = self.engine.optimizer
        return optimizer if self.stage == 0 else optimizer.optimizer  # type: ignore[attr-defined]

    def _masters(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return list(self._parameters.values())
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        masters: list[Tensor] = getattr(optimizer, name)
        return masters

    def _pass_over_unused(self) -> None:
        # of an op with several outputs, parameters behind an unused one get no gradient, and are told so all the same;
        # stage 3 alone takes that for one. Qwen-Image's last block has such outputs
        optimizer = self.engine.optimizer
        reduce = optimizer.reduce_independent_p_g_buckets_and_remove_grads

        def reduce_if_any(parameter: nn.Parameter) -> None:
            if parameter.grad is not None:
                reduce(parameter)

        optimizer.reduce_independent_p_g_buckets_and_remove_grads = reduce_if_any

    def _allocate_moments(self) -> None:
        # DeepSpeed links moments to parameters only after a first step: saving or restoring before would find none
        for master in self._masters():
            self._inner.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format).detach(),
                "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format).detach(),
            }
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _full(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        if self.stage == 0:
            value = parameter if moment is None else self._inner.state[parameter][moment]
        else:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            value = (
                safe_get_full_fp32_param(parameter)
                if moment is None
                else safe_get_full_optimizer_state(parameter, moment)
            )
        return value.detach().float().cpu().clone().contiguous()

    def _set_full(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        with torch.no_grad():
            if self.stage == 0:
                (parameter if moment is None else self._inner.state[parameter][moment]).copy_(value)
                return
            if self.stage == 3:
                self._set_chunk(parameter, value, moment)
                return
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            value = value.to(parameter.device)
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)

    def _set_chunk(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        # safe_set_full_* of stage 3 fails where a parameter's size is no multiple of the ranks: pad and cut it here
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
        chunk = padded[rank() * size : (rank() + 1) * size].to(parameter.device)
        if moment is None:
            safe_set_local_fp32_param(parameter, chunk)
        else:
            safe_set_local_optimizer_state(parameter, chunk, moment)

    def _publish_weights(self) -> None:
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        if self.stage == 3:
            for i in range(len(self._masters())):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)

    def _undo_average(self) -> None:
        # stage 3 refuses gradient_allreduce_op "sum"; scaling after the reduction is exact for any number of ranks
        optimizer = self.engine.optimizer
        if self._offloads:
            for master in self._masters():
                master.grad.mul_(world_size())  # type: ignore[union-attr]
            for parameter, norm in optimizer.norm_for_param_grads.items():
                optimizer.norm_for_param_grads[parameter] = norm * world_size()
        for tensors in optimizer.averaged_gradients.values():
            for gradient in tensors:
                gradient.mul_(world_size())

    def _gradient_norm(self) -> float:
        optimizer = self.engine.optimizer
        if self.stage == 0:
            norms = [p.grad.float().norm() for p in self._parameters.values() if p.grad is not None]
            return float(torch.stack(norms).norm())
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            return float(combine_grad_norm_groups(optimizer._get_norm_groups()))
        return float(optimizer.scaled_global_norm())

    def discard_gradients(self) -> None:
        """Drops what was accumulated: weights and moments keep their bits."""
        optimizer = self.engine.optimizer
        optimizer.zero_grad()
        if self._offloads:
            optimizer.reset_cpu_buffers()
        if self.stage in (1, 2):
            optimizer.micro_step_id = -1
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        if self.stage == 3:
            optimizer.averaged_gradients = {}
