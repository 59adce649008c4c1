"""Two ranks, of which one cannot write or is slow: both end alike, or neither notices."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from engine.launching import ROOT, environment, free_port
from tiny_sd3 import tiny_tree


def two_ranks(pipeline, folder, *, epochs=1, **variables):
    """Exit codes and stderr of both."""
    tree = tiny_tree(
        pipeline, folder / "run", run={"dir": str(folder / "run"), "epochs": epochs},
        rewards=[{"name": "slow_on_rank_1", "weight": 1.0}], sampling={"pairs_per_epoch": 6, "block_pairs": 1},
        evaluation={"every": 1, "count": 2, "batch": 1}, log={"images_every": 1},
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    port, ranks = str(free_port()), []
    for rank in "01":
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "tests/engine/rank_faults.py"), str(folder / "config.yaml")]
        ranks.append(
            subprocess.Popen(command, env=environment(**own, **variables), stderr=subprocess.PIPE, text=True, cwd=ROOT)
        )
    said = [process.communicate(timeout=120)[1] for process in ranks]
    return [process.returncode for process in ranks], said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "evaluations.jsonl", "pairs_epoch_000001.png"])
def test_what_only_rank_0_writes_fails_for_all(tiny_sd3, tmp_path, name):
    codes, said = two_ranks(tiny_sd3, tmp_path, FAIL=name)
    assert codes == [7, 7], said
    assert f"no space left on {name}" in said[0]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 7)


@pytest.mark.slow
def test_ranks_on_different_base_models_do_not_start(tiny_sd3, tmp_path):
    """As on two machines, each with its own copy."""
    shutil.copytree(tiny_sd3, tmp_path / "same")
    shutil.copytree(tiny_sd3, tmp_path / "other")
    scheduler = tmp_path / "other/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 2.0}))
    assert two_ranks(tiny_sd3, tmp_path, OTHER_BASE=str(tmp_path / "same"))[0] == [0, 0]
    codes, said = two_ranks(tiny_sd3, tmp_path, epochs=2, OTHER_BASE=str(tmp_path / "other"))
    assert codes == [2, 2]
    assert "the base model differs between ranks" in said[0]
    assert "scheduler/scheduler_config.json" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["1", "2", "4"])
def test_a_slow_rank_keeps_no_other_in_a_collective(tiny_sd3, tmp_path, call):
    """The first call is of the evaluation, the second of the first block, the fourth of the last."""
    codes, said = two_ranks(tiny_sd3, tmp_path, SLOW=call)
    assert codes == [0, 0], said
