"""What a reward does to the process that it runs in, and odd things that it returns, is its own error, by name."""

import os
import sys

import pytest
import torch

from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.runtime.errors import RewardError, exit_code

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
GOOD = torch.ones(3)


def scores(**rewards):
    return WeightedRewards({name: (1.0, reward) for name, reward in rewards.items()})(PROMPTS, IMAGES)


def refused(reward):
    with pytest.raises(RewardError, match="reward 'mine'") as caught:
        scores(mine=reward)
    assert exit_code(caught.value) == 5
    return str(caught.value)


@pytest.mark.parametrize("fails", [False, True], ids=["scores", "raises"])
def test_a_changed_working_folder_is_put_back_and_named(tmp_path, fails):
    def moves(prompts, images):
        os.chdir(tmp_path)
        if fails:
            raise ValueError("after it")
        return GOOD

    before = os.getcwd()
    assert f"the working folder, to {tmp_path}" in refused(moves)
    assert os.getcwd() == before


def test_a_changed_default_dtype_is_put_back_and_named():
    def halves(prompts, images):
        torch.set_default_dtype(torch.float64)
        return GOOD

    assert "torch's default dtype, to torch.float64" in refused(halves)
    assert torch.get_default_dtype() == torch.float32


def test_a_closed_stdout_is_named(tmp_path, monkeypatch):
    def closes(prompts, images):
        sys.stdout.close()
        return GOOD

    monkeypatch.setattr(sys, "stdout", (tmp_path / "out").open("w"))
    assert "closed" in refused(closes)


def test_to_write_into_the_images_is_nobody_elses_affair():
    def erases(prompts, images):
        images.zero_()
        return GOOD

    before = IMAGES.clone()
    found = scores(first=erases, second=lambda prompts, images: images.flatten(1).mean(1))
    assert torch.equal(IMAGES, before)
    torch.testing.assert_close(found["second"], before.flatten(1).mean(1))


@pytest.mark.parametrize("code", [0, 1, "bye", None])
def test_to_exit_is_a_failure_of_that_batch(code, capsys):
    found = scores(mine=lambda prompts, images: sys.exit(code))
    assert found["mine"].isnan().all()
    assert "reward 'mine': SystemExit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([10**400, 1, 2], "takes 3 numbers: "),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(3).to_sparse(), "layout torch.sparse_coo"),
        (torch.ones(3, dtype=torch.complex64), "complex numbers"),
        (torch.ones(3, device="meta"), "takes 3 numbers"),
        ({"scores": [1, 2, 3]}, "returned a dict"),
        ("123", "returned a str"),
        (None, "returned a NoneType"),
    ],
    ids=["huge", "sparse matrix", "sparse", "complex", "meta", "dict", "text", "none"],
)
def test_odd_values_are_named(value, says):
    assert says in refused(lambda prompts, images: value)
