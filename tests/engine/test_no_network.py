"""Training where no route leads anywhere: nothing of it asks a network, for telemetry or anything else."""

import json
import subprocess
import sys

import pytest

SMALL = (
    "sampling.pairs_per_epoch=4", "sampling.block_pairs=2", "sampling.steps=4", "update.train_steps=4", "run.epochs=1",
    "evaluation.count=4", "log.images_every=0",
)  # fmt: skip
ALONE = """
import fcntl, socket, struct, sys

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
    name, flags = struct.unpack("16sh", fcntl.ioctl(door, SIOCGIFFLAGS, struct.pack("16sh", b"lo", 0)))
    fcntl.ioctl(door, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | IFF_UP))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
    try:
        out.connect(("192.0.2.1", 9))
        sys.exit("there is a route")
    except OSError:
        pass

from fdfo_engine import train

sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_works_without_a_route_to_any_network(tmp_path):
    if subprocess.run(["unshare", "-Urn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    words = ["unshare", "-Urn", sys.executable, "-c", ALONE, "--config", "shapes", f"run.dir={tmp_path}", *SMALL]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
