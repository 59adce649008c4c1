"""Which backend each op of a run takes: what the run has recorded, or what is fastest here, or a fixed order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.config import BatchPlan, Config
from fdfo_engine.models.flow_model import FlowModel
from fdfo_engine.models.fused import ask_chooser, attention_backends, is_fused
from fdfo_engine.models.pipeline_model import PipelineModel
from fdfo_engine.ops import BACKENDS, Choices, backends, candidates, fdfo_loss, named, paired_step
from fdfo_engine.planning.kernel_cache import Batches, KernelCache
from fdfo_engine.planning.measuring import Measurement, Seconds, Timed, blank_velocity, fastest, seconds_of
from fdfo_engine.planning.self_check import check_ops
from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.distributed import broadcast_text, is_main, on_main, together, world_size
from fdfo_engine.runtime.kernel_record import Backends, backends_of
from fdfo_engine.runtime.run_checkpoints import kernels_of_run

PAIR_OPS = "pair_ops"
"""What the pair ops are called together."""

_LEGEND = "; * is taken: the first, unless another is faster by more than their noise"


@dataclass(frozen=True)
class Kernels:
    """What the ops of a run take, and how that came: `measured` holds the seconds an item where they were taken."""

    backends: Backends
    origin: str
    measured: dict[str, Seconds] = field(default_factory=dict)

    def pair_ops(self, otherwise: str) -> str:
        """The backend of the pair ops; `otherwise` where they were not measured."""
        return next((name for op, name in self.backends.items() if op.startswith(PAIR_OPS)), otherwise)

    def table(self) -> str:
        """A line an op and shape: microseconds an item on each backend, and which is taken."""
        width = max(map(len, self.measured), default=0)
        lines = [f"{name:{width}}  {_shown(seconds)}" for name, seconds in sorted(self.measured.items())]
        return "\n".join([f"kernels: {self.origin}{_LEGEND if lines else ''}", *lines])


def settled(config: Config, model: FlowModel, micro_batch: int, pair_backend: str, *, trains: bool) -> Kernels:
    """What the run of `config` takes on this machine, the same on every rank, put in force on `model`; collective.

    A run that has begun takes what it recorded, or the fixed order if it recorded nothing; so does one that may not
    measure (`kernels.tune`, `run.deterministic`), and an engine that does not train. Otherwise rank 0 measures, at the
    run's own shapes, what its cache does not know.

    Args:
        micro_batch: items of one forward and backward.
        pair_backend: what the pair ops take where nothing was measured.

    Raises:
        CheckpointError: the run's record is damaged.
        NumericsError: an op gives something else than plain torch here.
    """
    batches = batches_of(config, micro_batch)

    def found() -> Kernels:
        recorded = kernels_of_run(config.run.dir)
        if recorded is not None and _run_here(recorded, model):
            return Kernels(recorded, "as recorded by the run")
        if not config.kernels.tune or config.run.deterministic or not trains:
            return Kernels({}, "by a fixed order, not measured")
        return measured(model, batches, names_pair_ops=config.kernels.backend != "auto")

    kernels = on_main(found) or Kernels({}, "as rank 0 has them")
    if is_main() and trains:
        say(kernels.table())
    kernels = replace(kernels, backends=json.loads(broadcast_text(json.dumps(kernels.backends))))
    put_in_force(model.network, kernels)
    pair_ops = kernels.pair_ops(pair_backend)
    together(lambda: check_ops(model, Choices(kernels.backends), pair_ops))
    return kernels


def put_in_force(network: Any, kernels: Kernels) -> None:
    """Lets the ops of a fused `network` go by `kernels`; of another nothing changes."""
    if is_fused(network):
        ask_chooser(network, Choices(kernels.backends))


def as_saved(kernels: Kernels, state: Mapping[str, Any], network: Any) -> Kernels:
    """What a checkpoint with this `state` was computed with, put in force on `network`; `kernels` if it does not say.

    The pair ops stay as they are: which they are is said where it differs.
    """
    saved = backends_of(state.get("kernels"))
    if saved is None or saved == kernels.backends:
        return kernels
    found = Kernels(saved, "as recorded by the checkpoint")
    if found.pair_ops("") != kernels.pair_ops(""):
        warn("kernels: the checkpoint's pair ops ran on another backend: results will differ in last bits")
    put_in_force(network, found)
    return found


def measured(model: FlowModel, batches: Batches, *, names_pair_ops: bool = False, afresh: bool = False) -> Kernels:
    """What is fastest on this machine for `model` at `batches`, each op at the shapes that it meets there.

    Args:
        names_pair_ops: leaves the pair ops out.
        afresh: takes nothing from the cache.
    """
    started = time.perf_counter()
    cache = KernelCache(model.device, batches)
    known = {} if afresh else cache.load()
    timed = dict(known)
    if is_fused(model.network) and isinstance(model, PipelineModel):
        passes = [_forward(model, batches.rollout), _forward(model, batches.train)]
        timed = network_times(model.network, model.device, passes, known)
    if not names_pair_ops:
        timed |= pair_times(model.latent_shape, model.dtype, model.device, batches, known)
    return conclusion(timed, known, cache, batches, time.perf_counter() - started)


def conclusion(
    timed: dict[str, Timed], known: dict[str, Timed], cache: KernelCache, batches: Batches, seconds: float
) -> Kernels:
    """The fastest of each, of which those that are not `known` are kept in `cache`."""
    if new := {name: of for name, of in timed.items() if known.get(name) != of}:
        cache.save(new)
    items = {name: of.per_item(batches.rollout, batches.train) for name, of in timed.items()}
    origin = f"measured in {seconds:.1f} s, microseconds an item" if new else "as measured before on this machine"
    return Kernels({name: fastest(of) for name, of in items.items()}, origin, items)


def network_times(
    network: Any, device: torch.device, passes: Sequence[Callable[[], Tensor]], known: dict[str, Timed]
) -> dict[str, Timed]:
    """Of the ops that a fused `network` calls in both `passes`: a rollout's forward, and one of a micro-batch."""
    measurement = Measurement(device, known)
    sampling, training = passes
    ask_chooser(network, measurement)
    try:
        with torch.no_grad():
            sampling()
        with torch.enable_grad():
            training()
    finally:
        ask_chooser(network, None)
    return measurement.met


def pair_times(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, batches: Batches, known: dict[str, Timed]
) -> dict[str, Timed]:
    """Of the pair ops, all on one backend: a step of a rollout's pairs, and the loss of a micro-batch."""
    name = named(PAIR_OPS, (shape, dtype))
    if name in known:
        return {name: known[name]}
    pairs, items = max(1, batches.rollout // 2), batches.train
    names = candidates(BACKENDS, device)
    x, v = torch.zeros(pairs, 2, *shape, device=device), torch.zeros(pairs, 2, *shape, dtype=dtype, device=device)
    velocity = torch.zeros(items, *shape, dtype=dtype, device=device, requires_grad=True)
    pair, branch = torch.arange(items) // 2, torch.arange(items) % 2
    u, advantage = torch.zeros(-(-items // 2), *shape, device=device), torch.ones(items, device=device)

    def step(backend: str) -> Tensor:
        return paired_step(
            x, v, sigma=0.75, sigma_next=0.7, gamma=0.0025, seed=0, pair_ids=range(pairs), step=3, backend=backend
        )

    def loss(backend: str) -> Tensor:
        found, _ = fdfo_loss(
            velocity, velocity.detach(), u, advantage, clip_range=0.03, pair=pair, branch=branch, backend=backend
        )
        return torch.autograd.grad(found, velocity)[0]

    with torch.enable_grad():
        steps = seconds_of({b: partial(step, b) for b in names}, device)
        return {name: Timed(steps, seconds_of({b: partial(loss, b) for b in names}, device))}


def _forward(model: PipelineModel, batch: int) -> Callable[[], Tensor]:
    """A forward of `batch` samples, of one blank prompt."""
    return lambda: blank_velocity(model, torch.zeros(batch, *model.latent_shape, device=model.device))


def batches_of(config: Config, micro_batch: int) -> Batches:
    """Of the run of `config`, whose micro-batch has so many items; with guidance the network runs twice for each."""
    passes = 1 if config.sampling.guidance_scale == 1.0 else 2
    return Batches(2 * passes * BatchPlan.from_config(config, world_size()).block_pairs, passes * micro_batch)


def _run_here(recorded: Backends, model: FlowModel) -> bool:
    """Whether every recorded backend can run on this machine; says so where one can't."""
    reasons = backends(model.device) | attention_backends(model.device, model.dtype, 64)
    lost = sorted(set(recorded.values()) & {name for name, why in reasons.items() if why})
    if lost:
        warn(f"kernels: the run recorded {', '.join(lost)}, which can't run here: its results will differ in last bits")
    return not lost


def _shown(seconds: Seconds) -> str:
    taken = fastest(seconds)
    if len(seconds) == 1:
        return f"{taken} (nothing else here)"
    return ", ".join(
        f"{'*' if name == taken else ''}{name} {1e6 * spread.median:.1f}" for name, spread in seconds.items()
    )
