"""A reward of one rank that never returns, in one way or another: HANG says which, HANG_RANK of which rank."""

import ctypes
import os
import threading
import time

calls = 0


def hold_the_interpreter():
    """A C function that is called without giving up the interpreter's lock."""
    ctypes.PyDLL(None).sleep(100_000)


def wait_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


WAYS = {
    "sleep": lambda: time.sleep(100_000),
    "lock": wait_for_a_lock,
    "interpreter": hold_the_interpreter,
    "slow": lambda: time.sleep(float(os.environ["SLOW_S"])),
}


def brightness(prompts, images):
    global calls
    calls += 1
    way = os.environ.get("HANG")
    is_due = calls >= 2 if way == "slow" else calls == 2
    if way and is_due and os.environ["RANK"] == os.environ.get("HANG_RANK", "1"):
        WAYS[way]()
    return images.flatten(1).mean(1)
