"""Whether an epoch fits this machine: asked of the model when it is loaded, and held beside what was taken."""

from __future__ import annotations

import resource

import torch

from fdfo_engine.config import Config
from fdfo_engine.models.flow_model import FlowModel
from fdfo_engine.planning.footprint import Footprint, footprint
from fdfo_engine.planning.memory import GIB, Prediction, choose_micro_batch, refusal
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.distributed import any_rank, max_over_ranks, together, world_size
from fdfo_engine.runtime.errors import EnvironmentProblem


def gathers_rollout(config: Config, weights: int, device: torch.device) -> bool:
    """Whether a rollout at stage 3 holds the network's whole `weights`, bytes; auto leaves half of what is free.

    Collective: where one rank has no room, none does.
    """
    if config.zero.stage < 3 or config.zero.gather_rollout != "auto":
        return config.zero.stage == 3 and config.zero.gather_rollout is True
    if device.type != "cuda":
        return True
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserved
    return not any_rank(2 * weights > free)


def plan_memory(model: FlowModel, config: Config) -> Prediction | None:
    """The prediction for this GPU, and the micro-batch that fits every rank's; None where it could not be counted.

    Raises:
        EnvironmentProblem: two samples are too many to count, and `update.micro_batch: auto` has to know.
        UsageError: nothing fits.
    """
    sizes = together(lambda: _counted(model, config))
    if any_rank(sizes is None):
        return None
    assert sizes is not None
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_allocated(model.device)
    free = -max_over_ranks(-free, "the free memory")
    prediction = choose_micro_batch(sizes, config, world_size(), free, reward_bytes(config))
    if prediction.needed > free:
        warn(refusal(prediction, free))
    return prediction


def reward_bytes(config: Config) -> int:
    """What the reward models will take of a GPU, once they are loaded; says which are not counted."""
    size, unknown = WeightedRewards.from_config(config.rewards).gpu_bytes()
    if unknown:
        say(f"memory: without the models of {', '.join(unknown)}, whose sizes are not known before they are loaded")
    return size


def _counted(model: FlowModel, config: Config) -> Footprint | None:
    try:
        return footprint(model, model.encode_prompt(""), config.model.height, config.model.width)
    except torch.OutOfMemoryError as error:
        why = "memory: a forward and backward of two samples does not fit before weights are sharded"
        if config.update.micro_batch == "auto":
            raise EnvironmentProblem(f"{why}; set update.micro_batch: 1") from error
        warn(f"{why}; nothing is predicted")
        return None


def memory_record(prediction: Prediction | None, device: torch.device) -> dict[str, float]:
    """The peak since the start beside its `prediction`, GiB; on a CPU the process's own, which nothing predicts."""
    if prediction is None:
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    return {"peak_gib": torch.cuda.max_memory_allocated(device) / GIB, "predicted_gib": prediction.peak / GIB}
