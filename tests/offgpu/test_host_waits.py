"""The steady state of a rollout and an update: no host waits for the GPU, and nothing is left behind by a step."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.utils.config import get_timers_config
from offgpu.null_device import GPU, NullDevice, present, tensors_alive
from tiny_sd3 import PROMPTS, tiny_config

import fdfo_engine
from fdfo_engine.algorithms import build_algorithm
from fdfo_engine.models.fused import fuse
from fdfo_engine.models.prompt_cache import PromptCache
from fdfo_engine.models.registry import load_model
from fdfo_engine.rollout import sampler as sampling
from fdfo_engine.rollout.blocks import JoinedBlocks
from fdfo_engine.rollout.sampler import PairedSampler
from fdfo_engine.update import updater as updating
from fdfo_engine.update.deepspeed_settings import deepspeed_config
from fdfo_engine.update.totals import Totals
from fdfo_engine.update.updater import Updater

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU, and here is one")

CODE = Path(fdfo_engine.__file__).parent
MICRO_BATCH = 4
READS_OF_A_BLOCK = {
    "a value is read: rollout/sampler.py _check_latents",
    "nonzero counts values: models/finite.py require_finite_images",
}
"""Whether all is finite: asked once a block, when it is done."""


class Trainer:
    """In the place of `ZeroTrainer`, without DeepSpeed: the network itself, and gradients on its parameters."""

    def __init__(self, network):
        self.network = network

    def __call__(self, **inputs):
        return self.network(**inputs)

    def train(self, mode=True):
        pass

    def backward(self, loss, *, last):
        loss.backward()

    def learning_rate(self, lr):
        return nullcontext()

    def step(self):
        self.network.zero_grad(set_to_none=True)
        return 1.0, True

    step_count = 0


class Rig:
    """Sampler and updater of a tiny SD3, whose network is on a device that is not there."""

    def __init__(self, folder, run_dir, steps=4, churn=None, **settings):
        self.config = config = tiny_config(
            folder, run_dir, model={"dtype": "bfloat16", "fused": False}, update={"micro_batch": MICRO_BATCH},
            sampling={"steps": steps, "guidance_scale": 3.5} | ({} if churn is None else {"churn": churn}), **settings,
        )  # fmt: skip
        model = load_model(config, torch.device("cpu"))
        prompts = PromptCache(model)
        prompts.warm([*PROMPTS, config.model.negative_prompt])
        self.device, self.model = NullDevice(CODE), model
        with present(self.device):
            for part in (model.network, model.pipeline.vae):
                self.device.moved(part)
            model.device = GPU
            fuse(model.network, rehome=False)  # there is no memory to lay side by side
            algorithm = build_algorithm(config, "triton")
            self.sampler = PairedSampler(model, prompts, config, algorithm.plan, "triton")
            conditioner = self.sampler.conditioning
            self.updater = Updater(
                model, Trainer(model.network), model.network, None, config, conditioner, algorithm
            )  # fmt: skip

    def happened(self, call):
        """What `call` asked of the device, the second time: the first fills tables."""
        with present(self.device) as device:
            call()
            device.reset()
            call()
        return device

    def sample(self, first_pair=0, pairs=2):
        ids = list(range(first_pair, first_pair + pairs))
        return self.sampler.sample_block(self.model.network, PROMPTS[:pairs], ids)

    def rollout(self):
        with present(self.device):
            kept = JoinedBlocks(1)
            kept.put(self.sample(), 0)
            return kept.rollout(
                self.sampler.plan, self.sampler.grid, list(PROMPTS[:2]), [0, 1], backend="triton", seed=5,
                weights_version=0, first_pair=0, num_pairs=2, block_pairs=2,
            )  # fmt: skip

    def training(self):
        """A call of all micro-batches of one optimiser step, four of them, and of the step."""
        rollout = self.rollout()
        with present(self.device):
            adv = self.updater.algorithm.advantage(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), rollout)
        objective, share = self.updater.objective(rollout, adv, 1), self.updater.deal(rollout, 1)[0]

        def train():
            self.updater.accumulate(rollout, objective, share, Totals.zero(GPU), lambda done, of: None)
            self.updater.step()

        return train


@pytest.fixture(scope="module")
def rig(tiny_sd3, tmp_path_factory):
    return Rig(tiny_sd3, tmp_path_factory.mktemp("waits"))


def test_a_step_of_a_rollout_is_not_waited_for(rig, tiny_sd3, tmp_path):
    """A block with twice the steps has twice their launches and no wait, and no copy, more than another."""
    found = rig.happened(rig.sample)
    assert set(found.waits) == READS_OF_A_BLOCK
    waits, copies, steps = found.waits, found.copies, found.launches["paired_step_kernel"]
    longer = Rig(tiny_sd3, tmp_path, steps=8)
    found = longer.happened(longer.sample)
    assert found.launches["paired_step_kernel"] == 2 * steps
    assert (found.waits, found.copies) == (waits, copies)


def test_a_micro_batch_of_an_update_is_not_waited_for(rig):
    found = rig.happened(rig.training())
    assert found.launches["fdfo_loss_forward_kernel"] == 16 / MICRO_BATCH
    assert found.launches["replay_kernel"] == 16 / MICRO_BATCH
    assert not found.waits


def test_steps_leave_no_tensor_behind(rig):
    train = rig.training()
    rig.happened(train)
    before = tensors_alive()
    rig.happened(train)
    assert tensors_alive() == before


def test_no_kernel_is_compiled_again_for_other_pairs_steps_or_batches(rig, tiny_sd3, tmp_path):
    """Every number of a launch that changes in a run leaves the key alone that Triton caches a kernel by."""
    rig.happened(lambda: rig.sample(pairs=2))
    first = dict(rig.device.keys)
    for first_pair, pairs in ((0, 1), (15, 3), (2**33, 2)):
        assert rig.happened(partial(rig.sample, first_pair, pairs)).keys == first


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["flow_grpo", "awm", "nft", "ablation"])
def test_nor_do_the_other_algorithms_wait(algorithm, tiny_sd3, tmp_path):
    other = Rig(tiny_sd3, tmp_path, algorithm={"name": algorithm}, churn={})
    assert set(other.happened(other.sample).waits) == READS_OF_A_BLOCK
    assert not other.happened(other.training()).waits


def test_deepspeeds_own_clock_is_off(rig):
    """It synchronises before each forward from the third step on; which torch on a CPU does not show."""
    settings = deepspeed_config(rig.config.optimizer, rig.config.zero, values=1)
    assert not get_timers_config(settings).enabled
    assert get_timers_config({}).enabled


FAULTS = {
    "a value is read": lambda x: x.sum().item(),
    "a value is read in a condition": lambda x: bool(x.isfinite().all()),
    "nonzero counts values": lambda x: (x > 0).nonzero(),
    "an index counts values": lambda x: x[x > 0],
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy that is waited for": lambda x: torch.ones(3).to(x.device),
    "a copy of pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "an index on the CPU": lambda x: x[torch.tensor([0])],
    "a copy that is waited for, of a list": lambda x: torch.tensor([1.0], device=x.device),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_wait_shows(fault, rig, monkeypatch):
    """Beside the network, where it would be missed: in the guidance that a rollout and an update share."""

    def waiting(model, network, latents, *rest):
        FAULTS[fault](latents)
        return predict(model, network, latents, *rest)

    predict = sampling.predict
    for module in (sampling, updating):
        monkeypatch.setattr(module, "predict", waiting)
    expected = {name.split(",")[0].removesuffix(" in a condition") for name in [fault]}
    for call in (rig.sample, rig.training()):
        told = {wait.split(":")[0] for wait in rig.happened(call).waits if wait not in READS_OF_A_BLOCK}
        assert told == expected
