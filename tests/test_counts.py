"""The counts of the real architecture stay where they were brought; bounds leave room for another library's version."""

import pytest
import torch

from benchmarks import counts


@pytest.mark.slow
def test_launches_bytes_and_saved_activations_of_sd35_medium(monkeypatch):
    monkeypatch.undo()  # filling torch.empty would be counted
    plain, fused = counts.plain(), counts.fused()
    bounds = {"rollout": (370, 0.11), "forward": (400, 0.17), "backward": (500, 0.18)}
    for which, (launches, share) in bounds.items():
        assert fused[which].launches.total() < launches, which
        assert fused[which].bytes.total() < share * plain[which].bytes.total(), which
        assert plain[which].launches.total() > 3 * fused[which].launches.total(), which
    assert fused["forward"].saved_bytes < 1.2e9 * counts.TRAIN_BATCH
    assert 1.9e9 < plain["forward"].saved_bytes / counts.TRAIN_BATCH < 2.6e9


def test_a_meta_context_first_entered_in_a_test_works_in_the_next(monkeypatch):
    """torch lists its constructors once, at the first such context: it would miss a torch.empty that ours replaces."""
    with torch.device("meta"):
        torch.empty(0)
    monkeypatch.undo()
    with torch.device("meta"):
        assert torch.empty(1).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
