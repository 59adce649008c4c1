"""The counts of the real architecture stay where they were brought; bounds leave room for another library's version."""

import pytest

from benchmarks import counts


@pytest.mark.slow
def test_launches_bytes_and_saved_activations_of_sd35_medium(monkeypatch):
    monkeypatch.undo()  # filling torch.empty would be counted
    plain, fused = counts.plain(), counts.fused()
    bounds = {"rollout": (400, 0.16), "forward": (400, 0.17), "backward": (500, 0.18)}
    for which, (launches, share) in bounds.items():
        assert fused[which].launches.total() < launches, which
        assert fused[which].bytes.total() < share * plain[which].bytes.total(), which
        assert plain[which].launches.total() > 3 * fused[which].launches.total(), which
    assert fused["forward"].saved_bytes < 1.5e9 * counts.TRAIN_BATCH
    assert 1.9e9 < plain["forward"].saved_bytes / counts.TRAIN_BATCH < 2.6e9
