"""`fdfo tune`: times the backends of every op at a run's shapes and says which one a run will take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.bench import ARCHITECTURES, positive
from fdfo_engine.cli.options import add_config, config_of
from fdfo_engine.runtime.errors import UsageError

if TYPE_CHECKING:
    from fdfo_engine.planning.kernels import Kernels


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "tune",
        help="time the backends of every op here, at the shapes of a config",
        description="Loads the model of a config and times each op of its network, and the pair ops, on every backend "
        "that runs here, at the run's own shapes; prints microseconds an item (sampled once and trained once) with a * "
        "at what a run takes. The result is kept for runs to come; one that has begun keeps what it recorded.",
    )
    add_config(parse)
    parse.add_argument("--arch", choices=ARCHITECTURES, help="a transformer with random weights instead of a config's")
    parse.add_argument("--rollout-batch", type=positive, help="with --arch: images in a forward")
    parse.add_argument("--train-batch", type=positive, help="with --arch: items in a micro-batch")
    parse.add_argument("--threads", type=positive, help="on a CPU; default: torch's own choice")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints the table."""
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.terminal import importing

    with importing():
        import torch

    if arguments.arch and (arguments.overrides or arguments.config):
        raise UsageError(f"--arch {arguments.arch}: takes the place of a config; give one of them")
    if not arguments.arch and (arguments.rollout_batch or arguments.train_batch):
        raise UsageError("--rollout-batch and --train-batch: are for --arch; a config says sampling.block_pairs")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say((_of_architecture if arguments.arch else _of_config)(arguments, device).table())
    return 0


def _of_config(arguments: argparse.Namespace, device: Any) -> Kernels:
    from fdfo_engine.models.registry import load_model
    from fdfo_engine.planning.kernels import batches_of, measured

    config = config_of(arguments)
    batches = batches_of(config, config.update.micro_batch_items)
    named = config.kernels.backend != "auto"
    return measured(load_model(config, device), batches, names_pair_ops=named, afresh=True)


def _of_architecture(arguments: argparse.Namespace, device: Any) -> Kernels:
    import torch

    from fdfo_engine.bench.architectures import architectures
    from fdfo_engine.bench.tuning import measured_architecture
    from fdfo_engine.models.fused import fuse
    from fdfo_engine.planning.kernel_cache import Batches

    architecture = architectures()[arguments.arch]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = architecture.network(device, dtype)
    fuse(network)
    batches = Batches(
        arguments.rollout_batch or architecture.rollout_batch, arguments.train_batch or architecture.train_batch
    )
    return measured_architecture(architecture, network, device, dtype, batches)
