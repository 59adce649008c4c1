"""What runs on the recording stand-ins for a GPU: `python -m offgpu.recorded_steps CASE ARGUMENTS`, by `recorded_gpu`.

Cases are the functions below that take JSON and return JSON. An engine trains a tiny SD3: real code down to CUDA's
functions, DeepSpeed's too.
"""

import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from offgpu.recording import Recorder, answer, nothing_computed
from tiny_sd3 import PROMPTS, build_tiny_sd3, tiny_config

import fdfo_engine
from fdfo_engine.algorithms import fdfo
from fdfo_engine.bench.architectures import architectures
from fdfo_engine.models import graphed
from fdfo_engine.models.fused import fuse
from fdfo_engine.ops import fdfo_loss, pair_direction, paired_step, replay
from fdfo_engine.planning import kernels
from fdfo_engine.rollout import sampler
from fdfo_engine.runtime import distributed
from fdfo_engine.update import networks, updater
from fdfo_engine.update.advantage import advantage

PAIRS, BLOCK_PAIRS, STEPS, OPTIMIZER_STEPS, MICRO_BATCH = 4, 2, 4, 2, 4
WARM_UP_EPOCHS = 2
SIZES = (2, 1, 3, 15, 16, 17, 24, 31, 32, 33)
"""Of micro-batches: on both sides of 1 and of multiples of 16, which Triton compiles kernels anew for."""

DEVICE = torch.device("cuda", 0)


def steady(faults):
    """What an epoch asked of an engine that has done some, and one with each of `faults`."""
    with engine_on_nothing() as (engine, recorder):
        for _ in range(WARM_UP_EPOCHS):
            epoch(engine, recorder)
        found = {"": epoch(engine, recorder)}
        for fault in faults:
            with planted(FAULTS[fault], engine):
                found[fault] = epoch(engine, recorder)
        return found


def graphs(faults):
    """What the first and a later epoch asked of an engine with CUDA graphs, and one that captures each of `faults`."""
    with engine_on_nothing(model={"cuda_graphs": True}) as (engine, recorder):
        found = {"first": epoch(engine, recorder), "second": epoch(engine, recorder), "": epoch(engine, recorder)}
        parameters = [p for _, p in engine.model.trained_parameters()]
        for fault in faults:
            made = networks.networks(engine.config, engine.trainer, parameters, engine.device)
            engine._rollout_network, engine._updater._network = made
            with planted(FAULTS[fault], engine):
                found[fault] = _epoch_or_error(engine, recorder)
        return found


def rules():
    """What a capture was refused for by name, each capture with one wrong thing in it, and for those without."""
    recorder = Recorder()
    found = {}
    for name, wrong in IN_A_CAPTURE.items():
        x, graph = torch.ones(8, device="cuda"), torch.cuda.CUDAGraph()
        recorded = torch.cuda.Event()
        recorded.record()
        recorder.reset()
        with torch.cuda.graph(graph):
            y = x + 1
            wrong(y, recorded)
        found[name] = [event for event in recorder.events if event.startswith("refused")]
    return found


def loads(batches):
    """Kernels of Triton that were compiled or loaded for the first of `batches`, and those for all others after it.

    Each is a micro-batch: forward with and without gradient, and the ops of pairs at another step, seed and first pair.
    """
    recorder, architecture = Recorder(), architectures()["shapes"]
    with nothing_computed():
        network = architecture.network(DEVICE, torch.bfloat16)
        fuse(network, attention="auto", recompute="none")
        found = []
        for number, batch in enumerate(batches):
            recorder.reset()
            inputs = architecture.inputs(batch, DEVICE, torch.bfloat16)
            with torch.no_grad():
                network(**inputs)
            network(**inputs)[0].float().sum().backward()
            _ops_of_pairs(batch, step=number, seed=2**33 * number, first_pair=16 * number)
            found.append([name for name in recorder.events if name.startswith("load: ")])
    return found[0], sorted({name for names in found[1:] for name in names})


def _ops_of_pairs(count, *, step, seed, first_pair):
    ids, steps, shape = list(range(first_pair, first_pair + count)), torch.full((count,), step), (4, 8, 8)
    x = torch.zeros(count, 2, *shape, device=DEVICE)
    sigmas = torch.linspace(1, 0, len(SIZES) + 1)
    v = paired_step(
        x, x, sigma=float(sigmas[step]), sigma_next=float(sigmas[step + 1]), gamma=0.1, seed=seed, pair_ids=ids,
        step=step,
    )  # fmt: skip
    velocities = torch.zeros(count, 2, len(SIZES), *shape, dtype=torch.bfloat16, device=DEVICE)
    pair, branch = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    replay(velocities, pair_ids=ids, pair=pair, branch=branch, step=steps, sigmas=sigmas, gammas=0.1, seed=seed)
    own = v[:, 0].detach().requires_grad_()
    loss, _ = fdfo_loss(
        own, v[:, 1], pair_direction(x), torch.ones(count, device=DEVICE), clip_range=0.03, pair=pair, branch=branch
    )
    loss.backward()


@contextmanager
def engine_on_nothing(**sections):
    """An engine of a tiny SD3 in bfloat16, with guidance, and what it asked so far."""
    sections["model"] = {"dtype": "bfloat16"} | sections.get("model", {})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(nothing_computed())
        stack.enter_context(mock.patch.object(kernels, "check_ops"))  # they compute nothing
        stack.enter_context(mock.patch.object(fdfo, "advantage", _of_pairs_that_differ))
        build_tiny_sd3(folder)
        config = tiny_config(
            folder, folder / "run", update={"micro_batch": MICRO_BATCH, "optimizer_steps": OPTIMIZER_STEPS},
            sampling={
                "guidance_scale": 3.5, "pairs_per_epoch": PAIRS, "block_pairs": BLOCK_PAIRS, "steps": STEPS
            }, **sections,
        )  # fmt: skip
        recorder = Recorder()
        engine = stack.enter_context(fdfo_engine.Engine(config))
        yield engine, recorder
    distributed.close_distributed()


def _of_pairs_that_differ(rewards, direction):
    return advantage(rewards, torch.ones(direction.shape))


def epoch(engine, recorder):
    """What a rollout and an update asked."""
    asked = {}
    recorder.reset()
    rollout = engine.rollout(PROMPTS[:PAIRS])
    asked["rollout"] = _told(recorder)
    recorder.reset()
    engine.update(rollout, torch.tensor([[1.0, 0.0]] * PAIRS))
    asked["update"] = _told(recorder)
    return asked


def _epoch_or_error(engine, recorder):
    """As `epoch`, or what torch itself said of a capture."""
    try:
        return epoch(engine, recorder)
    except RuntimeError as error:
        return {"error": str(error)}


def _told(recorder):
    return {
        "events": recorder.events, "places": dict(recorder.places), "launches": sum(recorder.launches.values()),
        "kernels": recorder.launches, "unmodelled": recorder.unmodelled,
    }  # fmt: skip


@contextmanager
def planted(fault, engine):
    """Within this context `engine` has the fault."""
    with ExitStack() as stack:
        for where, name, value in fault(engine):
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def _in_each_step(wrong):
    """Beside the network, where it would be missed: in what a rollout and an update share."""

    def predict(model, network, latents, *rest):
        wrong(latents)
        return own(model, network, latents, *rest)

    own = sampler.predict
    return lambda _engine: [(module, "predict", predict) for module in (sampler, updater)]


def _in_the_network(wrong):
    """In the forward that a graph captures."""

    def patches(engine):
        layer = engine.trainer.engine.module.pos_embed
        own = layer.forward

        def forward(latents):
            wrong(latents)
            return own(latents)

        return [(layer, "forward", forward)]

    return patches


def _ranks_asked(_engine):
    """Whether to go on, before each micro-batch."""
    own = updater.Updater._inputs

    def inputs(self, *args):
        with mock.patch.object(distributed, "_alone", return_value=False):
            distributed.any_rank(False)
        return own(self, *args)

    return [(updater.Updater, "_inputs", inputs)]


def _own_leaves(_engine):
    """The forward on the parameters themselves, which DeepSpeed's hooks used first, on another stream."""

    @torch.enable_grad()
    def forward(step):
        step._leaves = step._parameters
        step._outputs = tuple(step._network(**step._inputs.held))
        step._upstream = tuple(map(torch.zeros_like, step._outputs))

    return [(graphed._Step, "_run_forward", forward)]


def _clock(engine):
    """DeepSpeed's own, which is on where nobody says otherwise."""
    clock = engine.trainer.engine.tput_timer
    return [(clock.config, "enabled", True), (clock, "global_step_count", clock.start_step)]


kept = []
FAULTS = {
    "a value is read": _in_each_step(lambda x: x.sum().item()),
    "a pageable copy": _in_each_step(lambda x: torch.ones(3).to(x.device, non_blocking=True)),
    "all is waited for": _in_each_step(lambda x: torch.cuda.synchronize()),
    "memory is not given back": _in_each_step(lambda x: kept.append(x.new_empty(1 << 24))),
    "ranks are asked": _ranks_asked,
    "DeepSpeed's clock": _clock,
    "the parameters themselves": _own_leaves,
    "a value is read in the graph": _in_the_network(lambda x: x.sum().item()),
    "a copy in the graph": _in_the_network(lambda x: torch.ones(3).to(x.device, non_blocking=True)),
}
"""Each gives what to put in the place of what: owner, name and value."""


def _beside(y, _event):
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())


def _and_back(y, _event):
    aside, captured = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(captured)
    with torch.cuda.stream(aside):
        y.mul_(2)
    captured.wait_stream(aside)


def _not_back(y, _event):
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        y.mul_(2)


IN_A_CAPTURE = {
    "nothing": lambda y, event: None,
    "work on another stream and back": _and_back,
    "two streams outside": _beside,
    "the default stream waits": lambda y, event: torch.cuda.default_stream().wait_stream(torch.cuda.current_stream()),
    "a wait for what was before": lambda y, event: torch.cuda.current_stream().wait_event(event),
    "another stream never comes back": _not_back,
    "a value is read": lambda y, event: y.sum().item(),
    "all is waited for": lambda y, event: torch.cuda.synchronize(),
    "an event is asked": lambda y, event: event.query(),
}


if __name__ == "__main__":
    answer({"steady": steady, "graphs": graphs, "loads": loads, "rules": rules})
