"""Several nodes: the examples under configs/cluster, and two launchers that stand in for two nodes."""

import re
import subprocess
import sys

import pytest
import yaml
from engine.launching import ROOT, TRAIN, environment, free_port, launch
from engine.test_launcher import metrics, status, weights, write_config

CLUSTER = ROOT / "configs" / "cluster"


def command_of(text):
    """The words of the one call of the launcher in an example, continued lines joined."""
    (found,) = re.findall(r"exec (deepspeed .*?--config \S+)", text.replace("\\\n", " "), re.DOTALL)
    return found.split()


def test_the_examples_start_the_same_command():
    slurm = CLUSTER / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", slurm], check=False).returncode == 0
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"] == service["spec"]["selector"]["job-name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    (script,) = spec["containers"][0]["args"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for text in (slurm.read_text(), script):
        words = command_of(text)
        assert {"--hostfile", "--no_ssh", "--node_rank", "--master_addr", "--master_port"} <= set(words)
        assert (ROOT / words[-3]).samefile(TRAIN)


@pytest.mark.slow
def test_two_launchers_train_as_one_process(tiny_sd3, tmp_path):
    """Each is started as the examples start a node's, without ssh; they meet at one address."""
    one = tmp_path / "one"
    done = launch(TRAIN, "--config", write_config(tiny_sd3, one, epochs=2))
    assert done.returncode == 0, done.stderr[-4000:]
    hostfile, two = tmp_path / "hostfile", tmp_path / "two"
    hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")
    config, port = write_config(tiny_sd3, two, epochs=2), str(free_port())
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh",
                "--master_addr", "127.0.0.1", "--master_port", port]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*launcher, "--node_rank", str(number), str(TRAIN), "--config", str(config)], env=environment(), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert status(two)["state"] == "finished"
    assert metrics(two)[0]["reward_mean"] == pytest.approx(metrics(one)[0]["reward_mean"], rel=1e-12)
    assert metrics(two)[1]["grad_norm"] == pytest.approx(metrics(one)[1]["grad_norm"], rel=1e-4)
    found, wanted = weights(two, 2), weights(one, 2)
    assert all((found[name] - wanted[name]).norm() <= 1e-3 * wanted[name].norm() + 1e-7 for name in wanted)
