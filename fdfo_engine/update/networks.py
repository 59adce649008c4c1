"""What a rollout and a micro-batch call: the trainer or CUDA graphs of its network, and the untrained one for KL."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import FlowModel, Network
from fdfo_engine.models.graphed import GraphedNetwork, GraphedTraining, graph_refusals
from fdfo_engine.runtime.errors import EnvironmentProblem
from fdfo_engine.update.zero import ZeroTrainer


def networks(
    config: Config, trainer: ZeroTrainer, parameters: Sequence[Tensor], device: torch.device
) -> tuple[Network, Network]:
    """What a rollout calls, and what a whole micro-batch does: `trainer`, or its network's CUDA graphs.

    Raises:
        EnvironmentProblem: `model.cuda_graphs` is set and can't be, with every reason.
    """
    if not config.model.cuda_graphs:
        return trainer, trainer
    reasons = graph_refusals(
        device, zero_stage=config.zero.stage, is_compiled=config.model.compile,
        checkpoints=config.model.gradient_checkpointing is True,
    )  # fmt: skip
    if reasons:
        raise EnvironmentProblem(f"model.cuda_graphs = true: {'; '.join(reasons)}")
    graphs = GraphedTraining(trainer.own_forward, trainer.engine.module, parameters)

    def micro_batch(**inputs: Any) -> tuple[Tensor, ...]:
        with trainer.forward_by(graphs):
            return trainer(**inputs)

    return GraphedNetwork(trainer), micro_batch


def kl_reference(config: Config, model: FlowModel) -> nn.Module | None:
    """A frozen copy of the network as it is now, untrained, where `update.kl_reference` asks for it.

    Before DeepSpeed takes the network: a copy of its pieces at stage 3 would be worth nothing.
    """
    if config.update.kl_reference is None:
        return None
    reference = copy.deepcopy(model.network).requires_grad_(False).eval()
    if config.model.compile:
        reference.compile()
    return reference
