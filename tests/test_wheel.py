"""The built wheel, outside the checkout: `kernels/`, configs, the compiled extension and the base are in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine.launching import environment

ROOT = Path(__file__).resolve().parents[1]


def run(*words, cwd, timeout=280, **variables):
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=timeout
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_installed_wheel_passes_the_doctor_and_trains(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    wheel = next(tmp_path.glob("*.whl"))
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    away = {"PYTHONPATH": str(site)}
    where = "import fdfo_engine, fdfo_engine.kernels.philox, fdfo_engine._native as n; print(fdfo_engine.__file__)"
    assert str(site) in run(sys.executable, "-c", where, cwd=tmp_path, **away)
    report = run(sys.executable, "-m", "fdfo_engine.cli.main", "doctor", cwd=tmp_path, **away)
    assert "ready to train" in report
    for name in ("cluster/slurm.sbatch", "examples/reward_server.py", "examples/comfyui_fdfo/__init__.py"):
        assert run(sys.executable, "-m", "fdfo_engine.cli.main", "config", "show", name, cwd=tmp_path, **away)
    run(sys.executable, "-m", "fdfo_engine.cli.main", "new", "mine", "--from", "sd35m_16gb", cwd=tmp_path, **away)
    assert (tmp_path / "mine/prompts.txt").is_file()
    bench = ["bench", "--arch", "shapes", "--candidates", "R", "--train-batch", "1", "--seconds", "0.01"]
    run(sys.executable, "-m", "fdfo_engine.cli.main", *bench, cwd=tmp_path, **away)
    assert (tmp_path / "fdfo_bench.json").is_file()
    short = ["run.epochs=1", "sampling.pairs_per_epoch=4", "sampling.block_pairs=2", "evaluation.every=0",
             "log.tensorboard=false", f"run.dir={tmp_path / 'run'}"]  # fmt: skip
    run(sys.executable, "-m", "fdfo_engine.cli.main", "train", "--config", "shapes", *short, cwd=tmp_path, **away)
    assert (tmp_path / "run/checkpoints/epoch_000001/weights.safetensors").is_file()
    assert os.listdir(site / "fdfo_engine" / "kernels")
