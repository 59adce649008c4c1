"""The watchdog: names a rank that does not get on, with its phase and its stacks, and ends the run resumable.

Each rank has one, in a thread of its own. It says that this rank lives and how far its work is (`rank_files`), and
looks at two things: whether the others still say so, and whether the work here (`pulse`) gets on. A rank that is
stopped, or whose interpreter is held, falls silent, and the others end it. A rank that waits within itself, in a reward
or for a lock, gives itself up. A rank that waits for others is not at fault: the one that it waits for is found.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType

from fdfo_engine.runtime import peers, process, pulse
from fdfo_engine.runtime.console import warn
from fdfo_engine.runtime.distributed import rank, world_size
from fdfo_engine.runtime.errors import DistributedError, report_and_exit_code
from fdfo_engine.runtime.peers import Peer
from fdfo_engine.runtime.rank_files import RankFile, Sign
from fdfo_engine.runtime.ticker import EVERY_S, Ticker

COLLECTIVE_TIMEOUTS = 6
"""A collective of a watched run gives up after that many `comm.timeout_s`: a rank may be slow as long as it gets on."""

LEAVE_S = 10.0
"""How long a rank that lost another one may take to end by itself; one within a collective often can't."""

_TELL_S = 5.0
_LOOKS = 20  # within comm.timeout_s
_OF_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/fdfo_engine/runtime/distributed.py")
_OF_LIBRARIES = ("/torch/", "/deepspeed/")


class Stillness:
    """For how long a value has not changed, of the time in which this process ran: a pause of all is no fault."""

    def __init__(self, most_s: float) -> None:
        """`most_s` is the longest that a look may be behind the one before it."""
        self._most_s = most_s
        self._value: object = None
        self._looked_s = time.monotonic()
        self.seconds = 0.0

    def look(self, value: object) -> float:
        """Seconds since `value` was another one."""
        now = time.monotonic()
        step, self._looked_s = min(now - self._looked_s, self._most_s), now
        self.seconds = self.seconds + step if value == self._value else 0.0
        self._value = value
        return self.seconds

    def look_again(self) -> float:
        """The same where nothing is known of the value."""
        return self.look(self._value)


class Watch:
    """Watches this run; a context manager around all that ranks do together."""

    def __init__(self, run_dir: Path | str, timeout_s: float, tell_end: Callable[[DistributedError], None]) -> None:
        """`tell_end` writes down how the run ended, where its own thread cannot; it may hang, and is not waited for."""
        self._run_dir, self._timeout_s, self._tell_end = Path(run_dir), timeout_s, tell_end
        self._every_s = min(2.0, timeout_s / _LOOKS)
        self._most_s = 2 * max(self._every_s, EVERY_S)
        self._ticker = Ticker(self._tick)
        self._looked_s = self._armed_s = 0.0
        self._beat = 0
        self._is_over = threading.Event()
        self._has_warned = False
        self._file: RankFile | None = None
        self._works: dict[int, Stillness] = {}
        self._others: dict[int, Stillness] = {}
        self._left: dict[int, Stillness] = {}

    def __enter__(self) -> Watch:
        pulse.forget()
        peers.meet_in(None)
        if world_size() > 1:
            self._file = RankFile(self._run_dir, rank())
            peers.meet_in(self._run_dir)
        self._ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._ticker.__exit__(kind, error, trace)
        pulse.forget()
        if peers.verdict():
            self._end_anyway()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._say(Sign(os.getpid(), self._beat, pulse.place(), has_left=True))
            self._file.close()

    def _tick(self) -> None:
        if time.monotonic() - self._looked_s >= self._every_s and not self._is_over.is_set():
            self._look()
            self._looked_s = time.monotonic()

    def _look(self) -> None:
        self._beat += 1
        own = self._own_sign()
        self._say(own)
        self._arm()
        lost = [peer for peer in self._other_ranks() if self._is_lost(peer)]
        if lost:
            self._leave("; ".join(map(self._why, lost)), lost)
        elif own.stuck and not self._others_are_overdue():
            self._give_up(own)

    def _say(self, sign: Sign) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a storage that is gone the others will say that this rank is silent
                self._file.write(sign)

    def _arm(self) -> None:
        """A thread that needs no interpreter writes the stacks, unless it is put off again: who holds it is seen."""
        if self._file is not None and time.monotonic() - self._armed_s > self._timeout_s / 10:
            faulthandler.dump_traceback_later(0.8 * self._timeout_s, file=self._file.stacks)
            self._armed_s = time.monotonic()

    # this rank

    def _own_sign(self) -> Sign:
        works = pulse.works()
        self._works = {thread: self._works.get(thread) or Stillness(self._most_s) for thread in works}
        frames = sys._current_frames()
        sign = Sign(os.getpid(), self._beat, pulse.place())
        for thread, work in works.items():
            still_s = self._works[thread].look((work, work.parts, _compilers_s()))
            frame = frames.get(thread)
            waits = frame is not None and waits_for_others(frame)
            if work.name == pulse.ENGINE:
                sign = replace(sign, still_s=still_s, waits=waits)
            if still_s >= self._timeout_s and time.monotonic() >= work.may_last_until and not waits:
                stuck = f"{work.name} has not got on for {still_s:.0f} s (comm.timeout_s){_at(frame)}"
                sign = replace(sign, stuck=stuck)
        return self._none_gets_on(sign)

    def _none_gets_on(self, sign: Sign) -> Sign:
        """Where every rank waits for the others, what is between them is at fault; all of them say so."""
        signs = [sign, *(peer.sign() for peer in self._other_ranks())]
        is_so = len(signs) > 1 and all(s and s.waits and s.still_s >= self._timeout_s for s in signs)
        if sign.stuck or not is_so:
            return sign
        stuck = f"every rank waits for the others since {sign.still_s:.0f} s (comm.timeout_s): the network, or a GPU"
        return replace(sign, waits=True, stuck=stuck)

    def _give_up(self, own: Sign) -> None:
        me = Peer(rank(), os.getpid(), True)
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.stacks.truncate(0)
            faulthandler.dump_traceback(self._file.stacks)
        text = f"{me}, in {own.place}: {own.stuck}{me.stacks_note()}"
        if world_size() > 1 or process.is_ours():
            self._leave(text, [])
        elif not self._has_warned:
            self._has_warned = True
            warn(text)

    # the others

    def _other_ranks(self) -> list[Peer]:
        return [peer for peer in peers.all_peers() if peer.rank != rank()] if self._file is not None else []

    def _is_lost(self, peer: Peer) -> bool:
        """Whether it has fallen silent, has gone for some time, or says that it is stuck."""
        sign = peer.sign()
        silence = self._others.setdefault(peer.rank, Stillness(self._most_s))
        silent_s = silence.look_again() if sign is None else silence.look(sign.beat)
        gone = self._left.setdefault(peer.rank, Stillness(self._most_s))
        is_gone = peer.is_gone or (sign is not None and sign.has_left)
        gone_s = gone.look(is_gone)
        return silent_s >= self._timeout_s or (is_gone and gone_s >= LEAVE_S) or bool(sign and sign.stuck)

    def _others_are_overdue(self) -> bool:
        """Whether one of them may be what this rank waits for without knowing: it is judged first."""
        return any(silence.seconds >= self._timeout_s / 4 for silence in self._others.values())

    def _why(self, peer: Peer) -> str:
        sign = peer.sign()
        if sign is not None and (sign.stuck or sign.has_left):
            return peer.last_words() if sign.stuck else f"{peer.last_words()}, has left the run"
        place = f", in {sign.place}" if sign is not None else ""
        if peer.is_gone:
            return f"{peer}{place}: its process is gone"
        silent = f"has given no sign for {self._others[peer.rank].seconds:.0f} s (comm.timeout_s)"
        why = "it was stopped" if peer.is_stopped else "it was stopped, or code of its holds the interpreter's lock"
        return f"{peer}{place}: {silent}; {why}{peer.stacks_note()}"

    # the end

    def _leave(self, text: str, lost: list[Peer]) -> None:
        """Breaks the collectives that wait for a lost rank; ends this process where that does not end them."""
        verdict = f"{text}\nthe same command goes on from the last checkpoint"
        peers.judge(verdict)
        for peer in lost:
            if peer.is_here and not peer.is_gone:
                with suppress(ProcessLookupError):
                    os.kill(peer.pid, signal.SIGKILL)
        if lost and self._is_over.wait(LEAVE_S):
            return
        error = DistributedError(verdict)
        teller = threading.Thread(target=self._tell_end, args=(error,), name="last words", daemon=True)
        teller.start()
        teller.join(_TELL_S)
        os._exit(report_and_exit_code(error))

    def _end_anyway(self) -> None:
        """What is left to do may wait for the rank that is lost."""
        if process.is_ours():
            timer = threading.Timer(2 * LEAVE_S, os._exit, [DistributedError.exit_code])
            timer.daemon = True
            timer.start()


def waits_for_others(frame: FrameType) -> bool:
    """Whether a thread, whose innermost frame this is, is within a collective."""
    inner: FrameType | None = frame
    while inner is not None:
        file = inner.f_code.co_filename
        if any(part in file for part in _OF_COLLECTIVES):
            return True
        if not any(part in file for part in _OF_LIBRARIES):
            return False
        inner = inner.f_back
    return False


def _at(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    return f": at {frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _compilers_s() -> float:
    """Processor time of this process's children that have ended: a compiler that did gets the work on."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
