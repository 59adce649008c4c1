"""`fdfo doctor`: whether this installation can train, and a run start, one line a check, with the reason if not."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.cli.options import add_config, config_of
from fdfo_engine.runtime.errors import EnvironmentProblem, error_message

if TYPE_CHECKING:
    from fdfo_engine.config import Config

_NEEDED = ("torch", "diffusers", "transformers", "peft", "deepspeed", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, why it fails (empty where it does not), and whether training needs it."""

    what: str
    reason: str = ""
    needed: bool = True

    def line(self) -> str:
        """As printed: `ok`, `missing` (training works without) or `BROKEN`."""
        word = "ok" if not self.reason else "BROKEN" if self.needed else "missing"
        return f"{word:8}{self.what}" + (f": {self.reason}" if self.reason else "")


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "doctor",
        help="check this installation, and whether a run could start",
        description="Checks Python, libraries, devices, op backends, the bundled model and storage. With a config it "
        "then looks at prompts, rewards, packages, model and disk of that run, as its start does; no weight is loaded. "
        "Exit code 3 when something that training needs is broken, else that of the first thing that would stop the "
        "run.",
    )
    add_config(parse)
    parse.add_argument("--dir", type=Path, default=Path(), help="where runs will be written; default: here")
    parse.add_argument("--quick", action="store_true", help="leave out loading and sampling the bundled model")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints each finding as it is made; returns 3 if a needed one is broken, else what would stop the config's run."""
    from fdfo_engine.runtime.console import say

    config = config_of(arguments) if arguments.config or arguments.overrides else None
    healthy = True
    for finding in findings(arguments.dir, quick=arguments.quick):
        say(finding.line())
        healthy &= not (finding.needed and finding.reason)
    say("ready to train" if healthy else "not ready: see the lines marked BROKEN")
    stops = 0 if config is None else _look_at(config)
    return stops if healthy else EnvironmentProblem.exit_code


def _look_at(config: Config) -> int:
    from fdfo_engine.training.preflight import look_at

    return look_at(config)


def findings(folder: Path, *, quick: bool = False) -> Iterator[Finding]:
    """Every check, cheap ones first."""
    yield Finding(f"python {platform.python_version()}", "" if sys.version_info >= (3, 11) else "takes 3.11 or newer")
    yield from _packages()
    yield _tried("deepspeed imports", lambda: importlib.import_module("deepspeed"))
    yield from _devices()
    yield _tried("kernels folder", _require_kernels)
    yield from _backends()
    yield from _attention()
    yield from _measured()
    yield _tried(f"storage of {folder.resolve()}", lambda: _probe(folder))
    base = _tried("bundled shapes model", _require_base)
    yield base
    if not base.reason and not quick:
        yield _tried("one pair of images sampled from it", _sample_pair)


def _tried(what: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except Exception as error:  # noqa: BLE001 - a diagnosis must go on; the reason is its product
        return Finding(what, error_message(error))
    return Finding(what)


def _packages() -> Iterator[Finding]:
    from fdfo_engine.runtime.environment import PACKAGES, package_version

    for name in PACKAGES:
        version = package_version(name)
        yield Finding(f"{name} {version}" if version else name, "" if version else "not installed", name in _NEEDED)


def _devices() -> Iterator[Finding]:
    from fdfo_engine.runtime.environment import describe_environment

    found = describe_environment()
    cpu, devices = found["cpu"], found["devices"]
    yield Finding(f"CPU {cpu['name']}, {cpu['cores']} cores ({', '.join(cpu['flags']) or 'no vector flags'})")
    for device in devices:
        yield Finding(f"GPU {device['name']}, {device['memory_gib']} GiB, capability {device['capability']}")
    if not devices:
        built = found["cuda"]["torch"]
        reason = f"torch is built for CUDA {built} but sees no device" if built else "this torch is built without CUDA"
        yield Finding("GPU", f"{reason}; the driver is {found['cuda']['driver'] or 'absent'}", needed=False)


def _require_kernels() -> None:
    if importlib.util.find_spec("fdfo_engine.kernels.philox_normal") is None:
        raise EnvironmentProblem("fdfo_engine.kernels is not mapped: reinstall, or run from a whole checkout")


def _backends() -> Iterator[Finding]:
    import torch

    from fdfo_engine.ops import backends, chosen_backend, ends_inside, implementations

    for name, reasons in backends().items():
        yield Finding(f"ops backend {name}", "; ".join(reasons), needed=name == "torch")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for op, offered in implementations().items():
        chosen = ", ".join(f"{chosen_backend(op, torch.device(device))} on {device}" for device in devices)
        yield Finding(f"op {op} runs {chosen}; made for {', '.join(offered)}")
    for device in devices:
        for end, reasons in ends_inside(chosen_backend("adapted_projections", torch.device(device))).items():
            where = f"behind it: {'; '.join(reasons)}" if reasons else "inside it"
            yield Finding(f"end {end} of an adapted product on {device}: {where}")


def _attention() -> Iterator[Finding]:
    import torch

    from fdfo_engine.models.fused.attention import attention_backends

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    for name, reasons in attention_backends(device, torch.bfloat16, 64).items():
        yield Finding(f"attention {name} on {device}", "; ".join(reasons), needed=name == "auto")


def _measured() -> Iterator[Finding]:
    """What runs have measured on this machine; which of it the fixed order would not take."""
    import torch

    from fdfo_engine.planning.kernel_cache import KernelCache
    from fdfo_engine.planning.measuring import fastest

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    known = KernelCache.everything(device)
    if not known:
        yield Finding(f"kernels measured on {device}", "none yet: a run does, and fdfo tune", needed=False)
    for batches, timed in known.items():
        items = {name: of.per_item(batches.rollout, batches.train) for name, of in timed.items()}
        others = {name: fastest(of) for name, of in items.items() if fastest(of) != next(iter(of))}
        where = f"on {device}, {batches.rollout} images a forward, {batches.train} items a micro-batch"
        yield Finding(f"kernels measured {where}: {len(items)} ops, {len(others)} of them off the fixed order")
        for name, taken in others.items():
            gain = next(iter(items[name].values())).median / items[name][taken].median
            yield Finding(f"op {name} runs {taken}: {gain:.2f} times as fast as {next(iter(items[name]))}")


def _probe(folder: Path) -> None:
    from fdfo_engine.runtime.run_folder import probe_storage

    if not folder.is_dir():
        raise EnvironmentProblem("no such folder")
    probe_storage(folder)


def _require_base() -> None:
    from fdfo_engine.shapes.pipeline import shapes_base

    index = shapes_base() / "model_index.json"
    if not index.is_file():
        raise EnvironmentProblem(f"{index} is absent: reinstall, or make it with `fdfo pretrain-shapes`")


def _sample_pair() -> None:
    """Through everything a run uses but the update: config, model, DeepSpeed, ops, decoding."""
    import torch

    from fdfo_engine.config import load_config
    from fdfo_engine.engine import Engine
    from fdfo_engine.runtime.distributed import close_distributed

    with tempfile.TemporaryDirectory() as folder:
        config = load_config("shapes", [f"run.dir={folder}", "sampling.pairs_per_epoch=1", "sampling.block_pairs=1"])
        try:
            images = Engine(config).rollout(["a red circle"]).images
        finally:
            close_distributed()
    if images.shape[:2] != (1, 2) or not torch.isfinite(images).all():
        raise EnvironmentProblem(f"images of shape {tuple(images.shape)} that are not all finite")
