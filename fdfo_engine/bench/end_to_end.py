"""Rollout and training rate of whole transformers with random weights: plain diffusers against the engine's blocks.

`fdfo bench`; under `torchrun` or `deepspeed` every rank measures at the same time on its own GPU. Candidates take turns
in one process on the same frozen weights:

- R: diffusers and PEFT, adapter in float32; on a GPU under bfloat16 autocast.
- E: the same in the model's own dtype, adapter too, without autocast (on a CPU that is R, so it is left out).
- C: E with every block through torch.compile.
- F: the engine's fused blocks, adapter in float32; each op on the backend of the fixed order.
- T: F with the backends that are measured here first, as a run does it.
- G: T as CUDA graphs.

A rollout step is one forward of a batch without gradient; a training step is forward and backward of a micro-batch.
The pair ops, the VAE, rewards, the optimizer and the exchange of gradients are not in it. Before anything is timed,
each candidate's velocity and adapter gradient are held against R in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.bench.architectures import Architecture, architectures, cast_frozen, sharing
from fdfo_engine.bench.flops import flops
from fdfo_engine.bench.record import header, write
from fdfo_engine.bench.tuning import measured_architecture
from fdfo_engine.models.fused import fuse
from fdfo_engine.models.graphed import GraphedNetwork, GraphedTraining, graph_refusals
from fdfo_engine.models.lora import trainable
from fdfo_engine.planning.footprint import saved_bytes
from fdfo_engine.planning.kernel_cache import Batches
from fdfo_engine.planning.kernels import put_in_force
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.distributed import all_gather_rows, barrier, close_distributed, is_main, setup_distributed
from fdfo_engine.runtime.interleaved import Spread, interleaved

PAIRS, STEPS = 432, 40
CHECK_BATCH = 2
FLOAT32_LIMIT = 1e-4
TIMES_AS_FAR_AS_R = 1.2
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table and writes the results file: what `fdfo bench` runs."""
    device = setup_distributed("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    known = architectures()
    names = arguments.arch or (["sd35-medium"] if device.type == "cuda" else ["shapes", "blocks"])
    result = header("fdfo bench", [word for word in sys.argv[1:] if word != "bench"]) | {
        "threads": torch.get_num_threads(),
        "matmul_flops_per_s": matmul_rate(device),
        "rows": [],
    }
    try:
        for name in names:
            result["rows"] += measure(name, known[name], device, arguments, result["matmul_flops_per_s"])
    finally:
        close_distributed()
    if is_main():
        write(arguments.out, result)
        say(f"written to {arguments.out}")
    return 0


def measure(
    name: str, architecture: Architecture, device: torch.device, arguments: argparse.Namespace, peak: float
) -> list[dict[str, Any]]:
    """One row a candidate of one architecture."""
    found = candidates(architecture, device, arguments.candidates)
    rollout_batch = arguments.rollout_batch or architecture.rollout_batch
    train_batch = arguments.train_batch or architecture.train_batch
    bench = {c.name: (c.rollout_step(rollout_batch), c.training_step(train_batch)) for c in found}
    memory = {c.name: c.memory(*bench[c.name], train_batch) for c in found}
    barrier("the measurement")
    taken = {}
    for kind, what in enumerate(("rollout", "training")):
        say(f"{name}: timing {what} steps of {', '.join(bench)} in turn, {arguments.seconds * len(bench):g} s or more")
        taken[what] = interleaved({n: steps[kind] for n, steps in bench.items()}, device, seconds=arguments.seconds)
    rollout, training = taken["rollout"], taken["training"]
    say(f"\n{name}: rollout batch {rollout_batch}, micro-batch {train_batch}, {peak / 1e12:.3g} TFLOP/s matmul")
    say(f"{'':3}{'images/s':>10}{'samples/s':>11}{'MFU fwd':>9}{'MFU train':>11}{'peak GiB':>10}{'epoch s':>9}")
    rows = []
    for c in found:
        row = {"architecture": name, "candidate": c.name, "rollout_batch": rollout_batch, "train_batch": train_batch}
        row |= rates(architecture, rollout[c.name], rollout_batch, training[c.name], train_batch, peak)
        rows.append(row | {"errors": c.errors} | memory[c.name])
        say(_line(rows[-1]))
    return rows


def rates(
    architecture: Architecture, rollout: Spread, rollout_batch: int, training: Spread, train_batch: int, peak: float
) -> dict[str, Any]:
    """Rates of all ranks together and of each, shares of the measured matmul rate, and what an epoch would take."""
    work = flops(architecture)
    own = torch.tensor([[rollout_batch / STEPS / rollout.median, train_batch / training.median]], dtype=torch.float64)
    ranks = all_gather_rows(own)
    images, samples = ranks.sum(0).tolist()
    return {
        "rollout_step_s": rollout._asdict(),
        "training_step_s": training._asdict(),
        "images_per_s": images,
        "training_samples_per_s": samples,
        "by_rank": ranks.tolist(),
        "mfu_rollout": work.forward * rollout_batch / rollout.median / peak,
        "mfu_training": work.training * train_batch / training.median / peak,
        "epoch_s": 2 * PAIRS / images + 2 * PAIRS * STEPS / samples,
    }


def candidates(architecture: Architecture, device: torch.device, wanted: str) -> list[Candidate]:
    """Those of `wanted` (letters) that can run here, each held against R in float32; says which cannot, and why."""
    say("random weights, and R in float32, which the others are held against")
    network = architecture.network(device)
    reference = Candidate("reference", architecture, network, device, torch.float32)
    exact = reference.answers()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cast_frozen(network, dtype)
    made = []
    for letter in wanted:
        why_not = refusal(letter, device)
        if why_not:
            say(f"{letter} is left out: {why_not}")
            continue
        say(f"{letter}: {MAKING[letter]}")
        made.append(MAKERS[letter](letter, architecture, sharing(network), device, dtype))
    del network, reference
    bound = FLOAT32_LIMIT
    for c in made:
        say(f"{c.name}: held against R" + (", for which its blocks compile: minutes" if c.name == "C" else ""))
        c.hold_against(exact, bound)
        if c.name == "R" and dtype != torch.float32:
            bound = TIMES_AS_FAR_AS_R * max(c.errors.values())
    return made


def refusal(letter: str, device: torch.device) -> str:
    """Why a candidate cannot run here; empty where it can."""
    if letter == "E" and device.type == "cpu":
        return "on a CPU it is R"
    if letter == "G":
        return "; ".join(graph_refusals(device, zero_stage=0, is_compiled=False, checkpoints=False))
    return ""


class Candidate:
    """One way to run an architecture: a network, what it takes, and how its autocast is set."""

    def __init__(
        self, name: str, architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name, self.network = name, network
        self._architecture, self._device, self._dtype = architecture, device, dtype
        self._adapter = dict(trainable(network))
        self.errors: dict[str, float] = {}

    def velocity(self, batch: int) -> Callable[[], Tensor]:
        """The forward on a fixed random batch."""
        inputs = self._architecture.inputs(batch, self._device, self._dtype)
        autocast = self.name == "R" and self._dtype != torch.float32

        def call() -> Tensor:
            with torch.autocast(self._device.type, torch.bfloat16) if autocast else nullcontext():
                out: Tensor = self.call_network(**inputs)[0]
            return out

        return call

    def call_network(self, **inputs: Any) -> tuple[Tensor, ...]:
        """The network's forward."""
        found: tuple[Tensor, ...] = self.network(**inputs)
        return found

    def rollout_step(self, batch: int) -> Callable[[], object]:
        """A forward without gradient."""
        forward = self.velocity(batch)
        return torch.no_grad()(forward)

    def training_step(self, batch: int) -> Callable[[], object]:
        """Forward and backward of a micro-batch, with a fixed random gradient of the velocity."""
        forward = self.velocity(batch)
        generator = torch.Generator(self._device).manual_seed(2)
        upstream: list[Tensor] = []

        def step() -> None:
            v = forward()
            if not upstream:
                upstream.append(torch.randn(v.shape, generator=generator, device=self._device))
            for parameter in self._adapter.values():
                parameter.grad = None
            (v.float() * upstream[0]).sum().backward()

        return step

    def answers(self) -> dict[str, Tensor]:
        """Velocity and adapter gradient of a small batch, float32 on the CPU."""
        self.training_step(CHECK_BATCH)()
        gradient = torch.cat([p.grad.float().flatten().cpu() for p in self._adapter.values() if p.grad is not None])
        for parameter in self._adapter.values():
            parameter.grad = None
        with torch.no_grad():
            return {"velocity": self.velocity(CHECK_BATCH)().float().cpu(), "gradient": gradient}

    def hold_against(self, exact: dict[str, Tensor], bound: float) -> None:
        """Relative errors (rms) against `exact`; in bfloat16 R sets the others' bound and has none itself."""
        for what, value in self.answers().items():
            self.errors[what] = float((value - exact[what]).norm() / exact[what].norm())
        is_bound = self.name != "R" or self._dtype == torch.float32
        assert not is_bound or max(self.errors.values()) <= bound, f"{self.name}: {self.errors}, limit {bound:.1e}"

    def memory(
        self, rollout: Callable[[], object], training: Callable[[], object], batch: int
    ) -> dict[str, int | None]:
        """Bytes saved for a sample's backward; on a GPU also the peak of each step, weights in."""
        saved = saved_bytes(self.velocity(batch), self.network.parameters())
        return {
            "saved_bytes_a_sample": saved // batch,
            "rollout_peak_bytes": self._peak(rollout),
            "training_peak_bytes": self._peak(training),
        }

    def _peak(self, step: Callable[[], object]) -> int | None:
        if self._device.type != "cuda":
            return None
        step()
        for parameter in self._adapter.values():
            parameter.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        taken: int = torch.cuda.max_memory_allocated() - before
        weights: int = sum(p.nbytes for p in self.network.parameters())
        return taken + weights


def plain(name: str, architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype) -> Candidate:
    """R: the adapter stays float32."""
    return Candidate(name, architecture, network, device, dtype)


def native(name: str, architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype) -> Candidate:
    """E: the adapter in the model's dtype too."""
    for _, parameter in trainable(network):
        parameter.data = parameter.data.to(dtype)
    return Candidate(name, architecture, network, device, dtype)


def compiled(
    name: str, architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype
) -> Candidate:
    """C: each block on its own, which compiles a kind of block once and not every layer."""
    torch._dynamo.config.cache_size_limit = 64  # blocks of one class share a cache: kinds, batches and grad modes
    for blocks in architecture.blocks:
        for block in getattr(network, blocks):
            block.compile(dynamic=False)
    return native(name, architecture, network, device, dtype)


def fused(name: str, architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype) -> Candidate:
    """F: the engine's own."""
    fuse(network, attention="auto", recompute="none")
    return Candidate(name, architecture, network, device, dtype)


def tuned(name: str, architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype) -> Candidate:
    """T: F as a run goes by it."""
    fuse_measured(architecture, network, device, dtype)
    return Candidate(name, architecture, network, device, dtype)


def graphed(name: str, architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype) -> Candidate:
    """G: forward, and forward with backward, captured once for each batch."""
    fuse_measured(architecture, network, device, dtype)
    return Graphed(name, architecture, network, device, dtype)


def fuse_measured(architecture: Architecture, network: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Fuses `network`, whose ops then go by what is measured at the batches of `architecture`."""
    fuse(network, attention="auto", recompute="none")
    batches = Batches(architecture.rollout_batch, architecture.train_batch)
    put_in_force(network, measured_architecture(architecture, network, device, dtype, batches))


class Graphed(Candidate):
    """Replays graphs of the network."""

    def __init__(self, name: str, architecture: Architecture, network: Any, *where: Any) -> None:
        super().__init__(name, architecture, network, *where)
        self._sampling = GraphedNetwork(network)
        self._training = GraphedTraining(network, network, list(self._adapter.values()))

    def call_network(self, **inputs: Any) -> tuple[Tensor, ...]:
        """The network's forward, and its backward with it where there are gradients."""
        return self._training(**inputs) if torch.is_grad_enabled() else self._sampling(**inputs)


MAKERS = {"R": plain, "E": native, "C": compiled, "F": fused, "T": tuned, "G": graphed}
MAKING = {
    "R": "diffusers' own blocks",
    "E": "the same in the model's dtype",
    "C": "the same through torch.compile",
    "F": "the engine's blocks",
    "T": "the engine's blocks, each op's fastest backend measured first",
    "G": "the same as CUDA graphs",
}


def matmul_rate(device: torch.device) -> float:
    """Operations a second of a square product: bfloat16 on a GPU, float32 on a CPU."""
    size = PRODUCT_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken = interleaved({"product": lambda: a @ b}, device, seconds=1.0)["product"]
    return 2 * size**3 / taken.median


def _line(row: dict[str, Any]) -> str:
    peak = row["training_peak_bytes"]
    return (
        f"{row['candidate']:3}{row['images_per_s']:10.3g}{row['training_samples_per_s']:11.3g}"
        f"{row['mfu_rollout']:9.0%}{row['mfu_training']:11.0%}{'-' if peak is None else f'{peak / 2**30:.1f}':>10}"
        f"{row['epoch_s']:9.0f}"
    )
