"""Several nodes: the examples under configs/cluster, and two launchers that stand in for two nodes."""

import os
import re
import signal
import subprocess
import sys
import time

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


LAUNCHER = """#!/bin/bash
# Dies of SIGTERM and leaves its rank behind, as deepspeed does.
setsid bash -c 'trap "sleep 0.5; echo saved >> out; exit" TERM; echo started >> out; while :; do sleep 0.1; done' &
sleep 60
"""


def test_in_its_container_the_job_passes_sigterm_on_and_waits(tmp_path):
    """As process 1 of a namespace of its own, which ends with it."""
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    (script,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    (tmp_path / "deepspeed").write_text(LAUNCHER)
    (tmp_path / "deepspeed").chmod(0o755)
    script = script.replace("/tmp/hostfile", str(tmp_path / "hostfile"))
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "bash", "-c", script]
    if subprocess.run([*command[:-1], "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces for this user")
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0"}
    unshare = subprocess.Popen(command, cwd=tmp_path, env=os.environ | path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (first,) = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(unshare.pid)], text=True).split()
    os.kill(int(first), signal.SIGTERM)
    assert unshare.wait(timeout=30) == 143
    assert (tmp_path / "out").read_text() == "started\nsaved\n"


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
