"""Ranks: joining them, and the few collectives the engine needs. No pickle: only tensors travel.

Every collective is a plain local operation in a single process, with or without a process group.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fdfo_engine.runtime import peers, pulse
from fdfo_engine.runtime.console import visible
from fdfo_engine.runtime.errors import (
    DistributedError,
    UsageError,
    error_message,
    exit_code,
    is_peer_loss,
    of_exit_code,
)
from fdfo_engine.runtime.host import host_kept
from fdfo_engine.runtime.loopback import require_loopback

T = TypeVar("T")

MAX_DIFF_BYTES = 1 << 20
MAX_DIFF_LINES = 8
_PATIENCE_S = 1.0
_LAST_WAIT_S = 5.0
_LOOPBACK = "lo"


def setup_distributed(
    device: torch.device | str, *, timeout_s: float = 600.0, join_timeout_s: float = 300.0
) -> torch.device:
    """Joins the process group and returns this rank's device (`cuda` becomes `cuda:LOCAL_RANK`).

    A world of one rank, which it is without a launcher, listens to nobody but this machine and sets no environment
    variable. The group is NCCL on CUDA and gloo elsewhere; DeepSpeed reuses it. A second call changes nothing.

    Args:
        device: where the tensors of this rank live.
        timeout_s: how long a collective waits for the slowest rank.
        join_timeout_s: how long to wait for all ranks to appear.

    Raises:
        DistributedError: the address cannot be reached or bound, or ranks are missing; names both.
    """
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        with host_kept():
            _join("nccl" if device.type == "cuda" else "gloo", timeout_s, join_timeout_s)
        if world_size() > 1:
            _meet()
    return device


@contextmanager
def launcher_environment() -> Iterator[None]:
    """Within it the variables of a launcher are set as it would set them: DeepSpeed reads them where it begins."""
    with host_kept():
        if world_size() == 1:
            os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
        for name, value in (("RANK", rank()), ("LOCAL_RANK", 0), ("WORLD_SIZE", world_size())):
            os.environ.setdefault(name, str(value))
        yield


def close_distributed() -> None:
    """Leaves the process group, if there is one.

    Call it before exiting, above all after a `DistributedError`, and end the script by `runtime.process.end_process`:
    gloo's threads, met by the interpreter's finalisation, abort the process, and its exit status with it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; the launcher's word before the group exists, 0 without a launcher."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks; the launcher's word before the group exists, 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes."""
    return rank() == 0


def barrier(what: str = "barrier") -> None:
    """Waits for all ranks; collective.

    Raises:
        DistributedError: a rank is gone.
    """
    any_rank(False, what)


def any_rank(flag: bool, what: str = "a flag") -> bool:
    """Whether `flag` is true on any rank; collective. Ranks agree on skipping and stopping through this."""
    return max_over_ranks(int(flag), what) > 0


def max_over_ranks(value: int, what: str = "a maximum") -> int:
    """Largest `value` over the ranks; collective."""
    pulse.got_on()
    if _alone():
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=_group_device())
    with _readable_failure(what):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def on_main(action: Callable[[], T]) -> T | None:
    """Runs `action` on rank 0 alone; the others wait and get None. Collective; errors as in `together`."""
    return together(action if is_main() else lambda: None)


def together(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; collective: if it fails on one, all raise, and none is left waiting.

    A rank where it went well raises the error of the first rank where it did not: same exit code, same words.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:  # noqa: BLE001 - raised again below, once the other ranks know
        error = caught
    if any_rank(error is not None, "work that may fail"):
        told = "" if error is None else f"{exit_code(error)}\n{error_message(error)}"
        texts = _texts_of_ranks(told)
        raise error or _first_error(texts)
    return result


def together_patiently(action: Callable[[], T], look: Callable[[], None] = lambda: None) -> T:
    """As `together`, for work that may take one rank longer than a collective waits: it runs in a thread meanwhile.

    The ranks exchange a flag every second until all are done. `look` is called that often on each; it may be
    collective, and what it raises ends the waiting: the thread, which may hang, is left to itself after some seconds.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    pool = ThreadPoolExecutor(1, "patient", use_device, (device,))
    future = pool.submit(pulse.working, action)
    pool.shutdown(wait=False)
    try:
        while any_rank(bool(wait([future], timeout=_PATIENCE_S).not_done), "work that takes long"):
            look()
    except BaseException:
        wait([future], timeout=_LAST_WAIT_S)
        raise
    return together(future.result)


def use_device(index: int | None) -> None:
    """Makes GPU `index` the present one: a new thread would take GPU 0, whatever its rank's is."""
    if index is not None:
        torch.cuda.set_device(index)


def _first_error(texts: list[str]) -> Exception:
    """Of texts that hold an exit code and a message where a rank failed, and nothing where it did not."""
    number, text = next((number, text) for number, text in enumerate(texts) if text)
    code, message = text.split("\n", 1)
    return of_exit_code(int(code), f"rank {number}: {message}")


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over the ranks, as a new tensor on the same device and of the same dtype; collective."""
    if _alone():
        return tensor.clone()
    total = tensor.detach().to(_group_device(), copy=True)
    with _readable_failure("a sum"):
        dist.all_reduce(total)
    return total.to(tensor.device)


def all_gather_rows(tensor: Tensor) -> Tensor:
    """The ranks' rows one after another, in rank order, on every rank; collective.

    `tensor` is `[rows, *shape]`; rows may differ between ranks and may be 0, shape and dtype may not.
    """
    if _alone():
        return tensor
    padded, rows = _padded(tensor)
    return _unpadded(_all_gather(padded), rows, tensor.device)


def gather_rows(tensor: Tensor) -> Tensor | None:
    """As `all_gather_rows`, on rank 0 only; None on the others. Collective."""
    if _alone():
        return tensor
    padded, rows = _padded(tensor)
    pieces = [torch.zeros_like(padded) for _ in rows] if is_main() else None
    with _readable_failure("a gather"):
        dist.gather(padded, pieces)
    return None if pieces is None else _unpadded(pieces, rows, tensor.device)


def broadcast_text(text: str) -> str:
    """Rank 0's `text`, on every rank; collective."""
    if _alone():
        return text
    payload = text.encode() if is_main() else b""
    size = max_over_ranks(len(payload))
    data = torch.zeros(size, dtype=torch.uint8)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    data = data.to(_group_device())
    with _readable_failure("a broadcast"):
        dist.broadcast(data, 0)
    return data.cpu().numpy().tobytes().decode()


def any_text(text: str) -> str:
    """The first rank's `text` that is not empty; empty where all are. Cut at `MAX_DIFF_BYTES`; collective."""
    return next(filter(None, _texts_of_ranks(text)), "")


def all_agree_hash(text: str, what: str) -> None:
    """Compares `text` over the ranks by its SHA-256; collective, and meant to be the first collective of a run.

    Args:
        text: the resolved config, the prompts, a checkpoint's name, ...
        what: its name in the message.

    Raises:
        UsageError: on every rank, naming the ranks that differ from rank 0 and the first lines that do.
    """
    if _alone():
        return
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digests = _all_gather(digest.to(_group_device()))
    differing = [r for r, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if differing:
        texts = _texts_of_ranks(text)
        lines = _differing_lines(texts[0], texts[differing[0]])
        head = f"{what} differs between ranks: rank {', '.join(map(str, differing))} is not as rank 0"
        raise UsageError("\n".join([head, *lines]))


def _join(backend: str, timeout_s: float, join_timeout_s: float) -> None:
    own, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    timeout = timedelta(seconds=timeout_s)
    if ranks == 1:
        require_loopback()
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    host, port = (_launched(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if host == "localhost" or host.startswith("127."):
        require_loopback()
    # torchrun's agent already serves the store.
    serves = own == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        tcp = TCPStore(
            host, int(port), ranks, serves, timeout=timedelta(seconds=join_timeout_s), wait_for_workers=False
        )  # fmt: skip
        store = PrefixStore(f"fdfo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
        _wait_for_ranks(store, own, ranks, f"{host}:{port}", join_timeout_s)
        dist.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        verb = "serve" if serves else "reach"
        raise DistributedError(f"rank {own} cannot {verb} {host}:{port}: {_first_line(error)}") from error


def _meet() -> None:
    """Lets every rank know which processes the others are."""
    card = torch.frombuffer(bytearray(peers.own_card()), dtype=torch.uint8).to(_group_device())
    peers.remember([bytes(piece.cpu().tolist()) for piece in _all_gather(card)])


def _launched(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise DistributedError(
            f"{name} is not set, and WORLD_SIZE = {os.environ['WORLD_SIZE']}: start it by a launcher"
        )
    return value


def _wait_for_ranks(store: Store, own: int, ranks: int, address: str, timeout_s: float) -> None:
    """Unlike the store's own waiting, knows which ranks are missing."""
    store.set(f"here/{own}", "1")
    deadline = time.monotonic() + timeout_s
    missing = list(range(ranks))
    while missing := [r for r in missing if not store.check([f"here/{r}"])]:
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing))
            raise DistributedError(f"{address}: rank {names} did not appear in {timeout_s:.0f} s")
        time.sleep(0.05)


def _alone() -> bool:
    if not dist.is_initialized():
        assert world_size() == 1, "setup_distributed comes before the first collective"
        return True
    return world_size() == 1


def _group_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _all_gather(tensor: Tensor) -> list[Tensor]:
    pieces = [torch.zeros_like(tensor) for _ in range(world_size())]
    with _readable_failure("a gather"):
        dist.all_gather(pieces, tensor)
    return pieces


def _padded(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """This rank's rows, padded to the longest rank's number, and every rank's number."""
    rows = [int(count) for count in _all_gather(torch.tensor([tensor.shape[0]], device=_group_device()))]
    padded = tensor.new_zeros((max(rows), *tensor.shape[1:]), device=_group_device())
    padded[: tensor.shape[0]] = tensor.detach()
    return padded, rows


def _unpadded(pieces: list[Tensor], rows: list[int], device: torch.device) -> Tensor:
    return torch.cat([piece[:count] for piece, count in zip(pieces, rows, strict=True)]).to(device)


def _texts_of_ranks(text: str) -> list[str]:
    if _alone():
        return [text]
    payload = text.encode()[:MAX_DIFF_BYTES]
    padded = torch.zeros(MAX_DIFF_BYTES, dtype=torch.uint8, device=_group_device())
    padded[: len(payload)] = torch.tensor(list(payload), dtype=torch.uint8)
    texts = [bytes(piece.cpu().tolist()).rstrip(b"\0") for piece in _all_gather(padded)]
    return [t.decode(errors="replace") for t in texts]


def _differing_lines(ours: str, theirs: str) -> list[str]:
    left, right = ours.splitlines(), theirs.splitlines()
    length = max(len(left), len(right))
    rows = zip(left + [""] * (length - len(left)), right + [""] * (length - len(right)), strict=True)
    lines = [f"  line {n}: {visible(a)!s} | {visible(b)!s}" for n, (a, b) in enumerate(rows, 1) if a != b]
    more = [f"  ... and {len(lines) - MAX_DIFF_LINES} more lines"] if len(lines) > MAX_DIFF_LINES else []
    return lines[:MAX_DIFF_LINES] + more


@contextmanager
def _readable_failure(what: str) -> Iterator[None]:
    pulse.got_on()
    try:
        yield
    except RuntimeError as error:
        raise _lost_ranks(what, error) from error
    pulse.got_on()


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Within it a library's own error about a lost rank, DeepSpeed's in an update say, is a DistributedError too."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        raise _lost_ranks("a library's collective", error) from error


def _lost_ranks(what: str, error: RuntimeError) -> DistributedError:
    gone = [] if peers.verdict() else peers.gone_ranks()
    who = f"; gone: {'; '.join(gone)}" if gone else ""
    why = peers.verdict() or f"{_first_line(error)}{who}"
    return DistributedError(f"rank {rank()} lost the other ranks in {what}: {why}")


def _first_line(error: BaseException) -> str:
    """Without the source location in front and the advice behind that gloo adds."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).split(". This is typically")[0]
