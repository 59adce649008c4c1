"""Imports what the package and its tests import of others, and nothing of the package: `mutation` forks off such a one.

A process that does so once can be forked for each run of tests, which then imports no more than our own code.
"""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys

from benchmarks import ROOT

_LISTED = """
import json, sys, hypothesis, pytest, pytest_timeout, scipy.stats, yaml, tiny_sd3
import fdfo_engine.cli.evaluate, fdfo_engine.evaluation.compare, fdfo_engine.loop
own = ("fdfo_engine", "tiny_sd3", "__main__")
print(json.dumps([name for name, module in sys.modules.items() if module and name.partition(".")[0] not in own]))
"""


def import_all() -> None:
    """In the order in which they are imported there."""
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}"
    done = subprocess.run([sys.executable, "-c", path + _LISTED], capture_output=True, text=True, check=True)
    for name in json.loads(done.stdout.splitlines()[-1]):
        importlib.import_module(name)
    gc.freeze()  # nothing of it is garbage: no run looks through it


import_all()
