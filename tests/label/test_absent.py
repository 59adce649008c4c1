"""A rater who is away for hours, on two ranks whose collectives give up after five seconds."""

import signal
import socket
import subprocess
import sys
import time

import pytest
from engine.launching import environment
from serve.serving import settings, waited_for

_RANK = """
import sys
from fdfo_engine import load_config
from fdfo_engine.runtime.errors import report_and_exit_code
from fdfo_engine.runtime.process import end_process
from fdfo_engine.serve import server

setup = server.setup_distributed
server.setup_distributed = lambda device, **_: setup(device, timeout_s=5.0)
try:
    server.serve(load_config("shapes", sys.argv[1:]), server.Door(port=0))
except BaseException as error:
    end_process(report_and_exit_code(error))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_row_rater_absent_for_hours(tmp_path):
    """Label page, rater absent: no collective is pending, nothing times out, the run is idle, a late label counts,
    and SIGTERM works at once."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "FDFO_CHOSEN_PORT": ""}
    with open(tmp_path / "log", "ab") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _RANK, *settings(tmp_path / "run")], stdout=log, stderr=log,
                env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            )
            for rank in range(2)
        ]  # fmt: skip
    try:
        alive = lambda: all(process.poll() is None for process in ranks)  # noqa: E731
        with waited_for(tmp_path / "run", alive, timeout_s=600) as client:
            name = client.create_round(count=4)["round"]
            time.sleep(20)
            assert alive(), (tmp_path / "log").read_text()
            now = client.run()
            assert (now["state"], now["queued"], now.get("phase"), now.get("error")) == ("idle", 0, None, None)
            assert client.round(name)["labelled"] == 0
            for pair in client.pairs(name):
                client.feedback(name, [{"pair_id": pair["pair_id"], "choice": "left"}])
            assert client.train(name)["epoch"] == 1
        time.sleep(7)  # idle again, for longer than a collective waits
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in ranks]
        assert codes == [75, 75], (tmp_path / "log").read_text()
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
