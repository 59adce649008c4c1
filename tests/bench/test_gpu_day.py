"""`make gpu-check` keeps its time and tells what it could not do; a miniature of it runs on a CPU."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_day, gpu_parts
from benchmarks.gpu_day import Command, Part, cpu_parts, run_parts
from benchmarks.gpu_day import gpu_parts as parts_of_a_gpu
from benchmarks.gpu_targets import TARGETS, summary


def script(text, **needs):
    return Command([sys.executable, "-c", text], **needs)


def test_a_part_that_fails_hangs_or_lacks_something_keeps_no_other_from_running(tmp_path):
    writes = "import json, sys; json.dump({'rows': []}, open('OUT/found.json', 'w')); print('written')"
    parts = [
        Part("fails", 1.0, [script("import sys; print('why'); sys.exit(3)"), script(writes)]),
        Part("hangs", 1.0, [script("import time; time.sleep(60)"), script(writes)]),
        Part("lacks", 1.0, [script(writes, modules=("no_such_module",)), script(writes, tools=("no-such-tool",))]),
        Part("runs", 1.0, [script(writes)]),
    ]
    fails, hangs, lacks, runs = run_parts(parts, 9.0, tmp_path)
    assert [line.split(":")[0] for line in fails.lines] == ["FAILED with 3", "ok"]
    assert "why" in next(iter(fails.tails.values()))
    assert hangs.lines[0].startswith("stopped after")
    assert "no time is left" in hangs.lines[1]
    assert "no_such_module is missing here" in lacks.lines[0]
    assert "no-such-tool is missing here" in lacks.lines[1]
    assert runs.is_whole
    assert runs.results == {"found": {"rows": []}}
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["fails.json", "hangs.json", "lacks.json", "runs.json"]
    assert json.loads((tmp_path / "runs.json").read_text())["results"] == runs.results


def test_time_that_a_part_leaves_is_the_next_ones(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu_day, "run_part", lambda part, seconds, scratch: given.append(seconds) or outcome(part.name))
    run_parts([Part("one", 1.0, []), Part("two", 1.0, []), Part("three", 2.0, [])], 400.0, tmp_path)
    assert given == pytest.approx([100.0, 400.0 / 3, 400.0], abs=1.0)  # the first two took no time


def outcome(name, **results):
    return gpu_day.Outcome(name, results=results)


def test_both_devices_run_the_same_parts_and_leave_at_most_eight_files():
    names = [part.name for part in parts_of_a_gpu()]
    assert names == [part.name for part in cpu_parts()]
    assert names == ["correctness", "sanitizer", "ops", "transformers", "epoch", "profile"]
    assert len(names) + 1 <= 8


def test_a_summary_reads_each_figure_and_its_ratio_to_the_target():
    op = {"candidate": "triton", "median_s": 2e-3, "bytes_per_s": 3.3e12, "copy_bytes_per_s": 4e12, "times_eager": 6.0}
    slow = op | {"candidate": "cpp", "median_s": 3e-3, "bytes_per_s": 1e12}
    block = {"rows": [row | {"case": "layer_norm_modulate forward, bfloat16 [12, 1024, 1536]"} for row in (op, slow)]}
    rates = {"images_per_s": 3.0, "training_samples_per_s": 50.0, "mfu_rollout": 0.5, "mfu_training": 0.4}
    bench = {"rows": [rates | {"candidate": "R", "images_per_s": 2.0}, rates | {"candidate": "F"}]}
    text = summary([vars(outcome("ops", block_ops=block)), vars(outcome("transformers", bench=bench))])
    figures = {line[:66].strip(): line[66:].split() for line in text.splitlines()}
    assert figures["layer_norm_modulate forward, bfloat16: share of copy"] == ["0.825", "0.88", "0.94"]
    assert figures["layer_norm_modulate forward, bfloat16: times eager"] == ["6", "4", "1.50"]
    assert figures["images/s of SD3.5-Medium, 40 steps"] == ["3", "6", "0.50"]
    assert figures["rollout: times plain diffusers"] == ["1.5", "2.2", "0.68"]
    assert figures["rollout: times compiled"] == ["not", "measured"]
    assert all(target.read({}) is None for target in TARGETS)


def test_small_ops_notices_a_wrong_backend(monkeypatch):
    gpu_parts.small_ops(torch.device("cpu"))
    right = gpu_parts.ops.pair_direction
    monkeypatch.setattr(gpu_parts.ops, "pair_direction", lambda x, backend: right(x, backend="torch") * 1.001
                        if backend == "cpp" else right(x, backend=backend))  # fmt: skip
    monkeypatch.setattr(gpu_parts.ops, "implementations", lambda: dict.fromkeys(NAMES, ("cpp", "torch")))
    with pytest.raises(AssertionError, match="pair_direction on cpp"):
        gpu_parts.small_ops(torch.device("cpu"))


NAMES = (
    "gated_residual", "layer_norm_modulate", "qk_rms_norm", "feed_forward", "adapted_projection", "paired_step",
    "fdfo_loss", "pair_direction",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_miniature_runs_whole_on_a_cpu(tmp_path):
    assert gpu_day.main(["--device", "cpu", "--minutes", "25", "--out", str(tmp_path)]) == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8
    for file in tmp_path.glob("*.json"):
        found = json.loads(file.read_text())
        assert all(line.startswith("ok") for line in found["lines"]), found["lines"] + list(found["tails"].values())
    assert json.loads((tmp_path / "profile.json").read_text())["results"]["profile"]["training"]["kernels"]
    assert "measured" in (tmp_path / "summary.txt").read_text()
