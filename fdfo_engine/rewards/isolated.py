"""A reward in a process of its own: one that hangs is killed, which a thread cannot be.

Prompts and options go over as JSON, images as raw bytes, scores come back as JSON: nothing is unpickled here.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.rewards.registry import build
from fdfo_engine.rewards.reward import Reward
from fdfo_engine.runtime import pulse
from fdfo_engine.runtime.distributed import use_device
from fdfo_engine.runtime.failures import FailedElsewhereError, Failure
from fdfo_engine.runtime.own_code import more_folders, search_in

START_S = 120.0
"""Seconds that the process may take to start and import, before the first batch's own time begins."""


class IsolatedReward(Reward):
    """Scores like the reward it holds, in a process that is killed when a batch takes more than `kill_after_s` seconds.

    The next batch starts another one. What is asked of a reward besides scores, such as `require_ready`, is answered
    here, where its model is never loaded.

    Raises, when called:
        TimeoutError: the batch took too long.
        FailedElsewhereError: the reward raised.
        RuntimeError: its process died.
    """

    def __init__(self, name: str, options: dict[str, Any], where: str, kill_after_s: float) -> None:
        self._inner = build(name, options, where)
        self._name, self._given, self._where, self._kill_after_s = name, options, where, kill_after_s
        self._forbids_downloads = False
        self._notes: dict[str, list[float]] = {}
        self._process: Any = None
        self._pipe: Connection | None = None

    def require_ready(self) -> None:
        """As the reward it holds."""
        self._inner.require_ready()

    def require_prompts(self, prompts: Sequence[str]) -> None:
        """As the reward it holds."""
        self._inner.require_prompts(prompts)

    def forbid_downloads(self) -> None:
        """As the reward it holds, in its process too."""
        self._inner.forbid_downloads()
        self._forbids_downloads = True

    def gpu_bytes(self) -> int | None:
        """As the reward it holds."""
        return self._inner.gpu_bytes()

    def take_notes(self) -> dict[str, Tensor]:
        """As the reward it holds, of the images that its processes have scored."""
        taken, self._notes = self._notes, {}
        names = self._inner.take_notes()
        return {name: torch.tensor(taken.get(name, []), dtype=torch.float32) for name in names}

    def self_test_case(self, side: int) -> tuple[str, Tensor]:
        """As the reward it holds."""
        return self._inner.self_test_case(side)

    def __call__(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """Scores `[N]` of images `[N, 3, H, W]`."""
        if self._process is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(json.dumps({"prompts": list(prompts), "shape": list(images.shape)}).encode())
            self._pipe.send_bytes(images.detach().float().cpu().contiguous().numpy().tobytes())
            answer = self._answer(self._kill_after_s, f"no scores after {self._kill_after_s:g} s (kill_after_s)")
        except (EOFError, ConnectionError) as error:
            code = self._ended()
            raise RuntimeError(f"its process died with exit code {code}") from error
        _raise_what_it_raised(answer)
        for note, values in answer["notes"].items():
            self._notes.setdefault(note, []).extend(values)
        return torch.tensor(answer["scores"], dtype=torch.float32)

    def cancel(self) -> None:
        """Kills the process."""
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        words = json.dumps([self._name, self._given, self._where]).encode()
        arguments = (theirs, words, device, self._forbids_downloads, more_folders())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            answer = self._answer(START_S, f"its process did not start within {START_S:g} s")
        except EOFError as error:
            raise RuntimeError(f"its process died as it started, with exit code {self._ended()}") from error
        if "error" in answer:
            self._ended()
        _raise_what_it_raised(answer)

    def _answer(self, seconds: float, late: str) -> dict[str, Any]:
        assert self._pipe is not None
        pulse.got_on(2 * seconds)
        if not self._pipe.poll(seconds):
            self._ended()
            raise TimeoutError(f"{late}; its process was killed")
        answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        return answer

    def _ended(self) -> int | None:
        self._process.kill()
        self._process.join()
        code: int | None = self._process.exitcode
        self._process = self._pipe = None
        return code


def _raise_what_it_raised(answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise FailedElsewhereError(Failure(**answer["error"]))


def _serve(pipe: Connection, words: bytes, device: int | None, forbids_downloads: bool, folders: list[Path]) -> None:
    """The other process: builds the reward, then answers batches until the pipe closes."""
    use_device(device)
    search_in(*folders)
    reward: Reward | None = None
    try:
        reward = build(*json.loads(words))
        if forbids_downloads:
            reward.forbid_downloads()
        pipe.send_bytes(b"{}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told to the parent, which raises
        pipe.send_bytes(json.dumps({"error": Failure.of(error).as_dict()}).encode())
    while reward is not None:
        try:
            header = json.loads(pipe.recv_bytes())
            data = bytearray(pipe.recv_bytes())
        except EOFError:
            return
        images = torch.frombuffer(data, dtype=torch.float32).view(header["shape"])
        pipe.send_bytes(json.dumps(_scored(reward, header["prompts"], images)).encode())


def _scored(reward: Reward, prompts: list[str], images: Tensor) -> dict[str, Any]:
    try:
        with torch.no_grad():
            scores = torch.as_tensor(reward(prompts, images), dtype=torch.float32).cpu().tolist()
        return {"scores": scores, "notes": {name: values.tolist() for name, values in reward.take_notes().items()}}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - anybody's code; the parent reports it and asks once more
        return {"error": Failure.of(error).as_dict()}
