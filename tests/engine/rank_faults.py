"""A run as one of several ranks, started without a launcher, with a fault that environment variables describe.

FAIL: a file whose writer fails on rank 0. SLOW: a call of the reward that takes rank 1 twice as long as a collective
waits. OTHER_BASE: where rank 1 finds the base model. Exits as `train.py` does.
"""

import os
import sys
import time

from fdfo_engine import loop
from fdfo_engine.config import load_config
from fdfo_engine.models import registry
from fdfo_engine.rewards import background, register
from fdfo_engine.runtime import event_log, run_log, run_pictures
from fdfo_engine.runtime.distributed import close_distributed
from fdfo_engine.runtime.errors import CheckpointError, report_and_exit_code
from fdfo_engine.runtime.process import end_process

COLLECTIVE_S = 3.0


def failing(write):
    def fails(path, *arguments):
        if os.environ.get("FAIL") in path.name:
            raise CheckpointError(f"no space left on {path.name}")
        return write(path, *arguments)

    return fails


def failing_amid_update(write):
    def fails(log, event):
        if os.environ.get("FAIL") == log.path.name and event.type == "phase" and event.data.name == "update":
            raise CheckpointError(f"no space left on {log.path.name}")
        write(log, event)

    return fails


@register("slow_on_rank_1")
class Slow:
    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, images):
        self.calls += 1
        if (os.environ["RANK"], str(self.calls)) == ("1", os.environ.get("SLOW")):
            time.sleep(2 * COLLECTIVE_S)
        return images.flatten(1).mean(1)


def main(config):
    if "FAIL" in os.environ:
        run_log.append_line = failing(run_log.append_line)
        save_png = run_pictures.save_png
        run_pictures.save_png = lambda picture, path: failing(lambda path: save_png(picture, path))(path)
        event_log.EventLog.__call__ = failing_amid_update(event_log.EventLog.__call__)
    if os.environ["RANK"] == "1" and "OTHER_BASE" in os.environ:
        find = registry.find_base
        other = {"id": os.environ["OTHER_BASE"]}
        registry.find_base = lambda settings, kind: find(settings.model_copy(update=other), kind)
    background.MAX_BLOCKS_WAITING = 1
    setup = loop.setup_distributed
    loop.setup_distributed = lambda device, **_: setup(device, timeout_s=COLLECTIVE_S)
    try:
        loop.run(load_config(config))
    except Exception as error:  # noqa: BLE001 - the top, as in train.py
        return report_and_exit_code(error)
    finally:
        close_distributed()
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1]))
