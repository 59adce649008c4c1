"""Rewards for runs in tests: of pixels, recorded, and able to fail or to kill their process on a given call."""

import hashlib
import os
import signal
from pathlib import Path

import torch

from fdfo_engine.runtime.errors import RewardError

calls = 0


def left_bright(prompts, images):
    """100 times how much brighter the left half is. RECORD names a file of image hashes, KILL_AT_CALL a call."""
    global calls
    calls += 1
    if "RECORD" in os.environ:
        digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
        with Path(os.environ["RECORD"]).open("a") as file:
            file.write(f"{len(images)} {digest}\n")
    if calls == int(os.environ.get("KILL_AT_CALL", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    half = images.shape[-1] // 2
    return 100 * (images[..., :half] - images[..., half:]).flatten(1).mean(1)


def blank_one_pair(prompts, images):
    scores = left_bright(prompts, images)
    scores[1] = torch.nan
    return scores


def blind_from_third_call(prompts, images):
    scores = left_bright(prompts, images)
    return scores if calls < 3 else torch.full_like(scores, torch.nan)


def never(prompts, images):
    raise RuntimeError("the server is on fire")


def gone_on_one_rank(prompts, images):
    """With GONE set, rank 1 fails on its block of epoch 2."""
    scores = left_bright(prompts, images)
    if "GONE" in os.environ and os.environ["RANK"] == "1" and calls == 2:
        raise RewardError("the server of rank 1 is gone")
    return scores


def one_too_few(prompts, images):
    return torch.zeros(len(images) - 1)


def indifferent(prompts, images):
    return torch.zeros(len(images))
