"""What the stand-ins of `recording_driver/` wrote down; only in a process that loads them in the place of CUDA."""

import ctypes
import json
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import fdfo_engine
from fdfo_engine.runtime.process import end_process

CODE = str(Path(fdfo_engine.__file__).parent)
EVENTS, KERNELS, UNMODELLED = range(3)
WAITS = ("wait: ", "copy of pageable memory", "allocation", "refused: ")
"""What is told with its place."""

Listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Recorder:
    """What a GPU was asked since `reset`.

    Attributes:
        places: waits, copies of pageable memory, allocations and what CUDA would refuse, with the function of the
            engine that was running, and how often.
    """

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.recorder_report.restype = ctypes.c_char_p
        self.places = Counter()
        self._listener = Listener(self._told)  # alive as long as it may be called
        self._library.recorder_listen(self._listener)

    def reset(self):
        """Forgets what happened so far."""
        self._library.recorder_reset()
        self.places.clear()

    @property
    def events(self):
        """How often, by name."""
        return self._report(EVENTS)

    @property
    def launches(self):
        """By the name of the kernel."""
        return self._report(KERNELS)

    @property
    def unmodelled(self):
        """Calls of functions that the stand-ins know nothing of."""
        return self._report(UNMODELLED)

    def _report(self, record):
        lines = self._library.recorder_report(record).decode().splitlines()
        return {name: int(count) for name, count in (line.split("\t") for line in lines)}

    def _told(self, name):
        event = name.decode()
        if event.startswith(WAITS):
            self.places[f"{event}: {_place()}"] += 1


def _place():
    """File and function of the innermost call of the engine's code."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(CODE) and not name.endswith("ops/_checks.py"):
            return f"{name.removeprefix(CODE).lstrip('/')} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def nothing_computed():
    """Within this context what the engine asks of a GPU in a condition is true: all that is read from one is zero.

    Torch takes its kernels that need no cuDNN, of which there is no stand-in.
    """
    own, version = Tensor.__bool__, torch.backends.cudnn.version

    def condition(tensor):
        found = own(tensor)  # the host waits for it all the same
        return found or (tensor.is_cuda and sys._getframe(1).f_code.co_filename.startswith(CODE))

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    Tensor.__bool__, torch.backends.cudnn.version = condition, lambda: None
    try:
        yield
    finally:
        Tensor.__bool__, torch.backends.cudnn.version = own, version


def answer(cases):
    """Prints as JSON what the case named on the command line gives, out of `cases`, and ends the process."""
    case, arguments = sys.argv[1:]
    sys.stdout.write(json.dumps(cases[case](*json.loads(arguments))) + "\n")
    end_process(0)  # libraries that are torn down by their own exit functions still call the stand-ins
