"""One rank of a run on ranks whose machines would choose otherwise: writes down what its ops take."""

import json
import os
import sys
from pathlib import Path

from tiny_sd3 import tiny_config

from fdfo_engine.engine import Engine
from fdfo_engine.planning import kernels, measuring
from fdfo_engine.runtime.distributed import close_distributed
from fdfo_engine.runtime.interleaved import Spread
from fdfo_engine.runtime.process import end_process

PREFERRED = ("torch", "cpp")
"""By rank."""


def write(pipeline, out):
    rank = int(os.environ["RANK"])
    os.environ["XDG_CACHE_HOME"] = str(out / f"cache{rank}")

    def taken(calls, device):
        return {name: Spread(*3 * [1.0 if name == PREFERRED[rank] else 2.0]) for name in calls}

    measuring.seconds_of = kernels.seconds_of = taken
    with Engine(tiny_config(pipeline, out / "run", kernels={"tune": True})) as engine:
        asked = engine.model.network.forward.chooser
        found = {"kernels": engine.kernels.backends, "asked": asked.backends, "pair_ops": engine.backend}
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
    close_distributed()
    end_process(0)
