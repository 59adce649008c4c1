"""A rollout that is cut, kept on disk or grown old, made by hand: every pair has its number in every tensor."""

import dataclasses
import json

import pytest
import torch

from fdfo_engine.runtime.durable import sealed_json
from fdfo_engine.runtime.errors import CheckpointError, UsageError
from fdfo_engine.trajectory import Rollout, UnscoredRollout
from fdfo_engine.trajectory import rollout as rollout_module

FIRST, PAIRS, STEPS = 30, 5, 3
CPU = torch.device("cpu")


def numbered(*axes, dtype=torch.float32):
    """`[P, *axes]`, filled with 1, 2, 3, ..."""
    return torch.arange(1, PAIRS + 1, dtype=dtype).view(-1, *[1] * len(axes)).expand(PAIRS, *axes).clone()


@pytest.fixture
def rollout():
    return Rollout(
        images=numbered(2, 3, 8, 8), prompts=list("abcde"), pair_ids=list(range(FIRST, FIRST + PAIRS)),
        velocities=numbered(2, STEPS, 4, 2, 2, dtype=torch.bfloat16), direction=numbered(4, 2, 2), distance=numbered(),
        gammas=numbered(STEPS + 1, dtype=torch.float64), sigmas=torch.linspace(1, 0, STEPS + 1),
        timesteps=torch.tensor([1000.0, 600.0, 300.0]), seed=11, weights_version=6, first_pair=FIRST, num_pairs=PAIRS,
        block_pairs=2, backend="torch", finals=numbered(2, 4, 2, 2),
    )  # fmt: skip


def firsts(tensor):
    """The first number of each pair."""
    return tensor.flatten(1)[:, 0].tolist() if tensor.ndim > 1 else tensor.tolist()


def test_kept_pairs_are_whole_and_in_order(rollout):
    part = rollout.keep([FIRST + 4, FIRST + 1, FIRST + 4])
    assert (part.pair_ids, part.prompts, part.num_pairs) == ([FIRST + 1, FIRST + 4], ["b", "e"], 2)
    for name in ("images", "velocities", "direction", "distance", "gammas", "finals"):
        assert firsts(getattr(part, name)) == [2, 5], name
    assert part.local_rows.tolist() == [0, 1], "rewards are given for the kept pairs alone"
    assert part.blocks.tolist() == [0, 2], "computed together with what they were sampled with"
    assert part.ids_of(torch.tensor([1, 0])).tolist() == [FIRST + 4, FIRST + 1]
    again = part.keep([FIRST + 4])
    assert (again.pair_ids, again.local_rows.tolist(), firsts(again.images)) == ([FIRST + 4], [0], [5])
    assert rollout.num_pairs == PAIRS, "the whole one stays as it was"


def test_pairs_that_are_not_there_are_named(rollout):
    with pytest.raises(UsageError, match=r"not of it: \[35\]"):
        rollout.keep([FIRST, FIRST + PAIRS])
    with pytest.raises(UsageError, match="are empty"):
        rollout.keep([])
    with pytest.raises(UsageError, match=r"not of it: \[30\]"):
        rollout.keep([FIRST + 1]).keep([FIRST])


def test_rows_of_a_rank_are_counted_from_the_rollouts_first_pair(rollout):
    assert rollout.local_rows.tolist() == [0, 1, 2, 3, 4]
    assert rollout.blocks.tolist() == [0, 0, 1, 1, 2]
    second_rank = dataclasses.replace(rollout, pair_ids=[FIRST + 3, FIRST + 4], prompts=["d", "e"])
    assert second_rank.local_rows.tolist() == [3, 4]
    assert dataclasses.replace(second_rank, kept=[FIRST + 1, FIRST + 3, FIRST + 4]).local_rows.tolist() == [1, 2]


def test_items_are_picked_by_pair_branch_and_step(rollout):
    rollout.velocities += torch.tensor([0.0, 10.0]).view(2, 1, 1, 1, 1) + torch.tensor([0.0, 100, 200]).view(3, 1, 1, 1)
    rollout.finals += torch.tensor([0.0, 10.0]).view(2, 1, 1, 1)
    pair, branch, step = torch.tensor([0, 4, 2]), torch.tensor([1, 0, 1]), torch.tensor([2, 1, 0])
    assert firsts(rollout.velocities_at(pair, branch, step).float()) == [211, 105, 13]
    assert firsts(rollout.finals_at(pair, branch)) == [11, 5, 13]


@pytest.mark.parametrize(
    ("used", "trained", "now", "refused"),
    [
        (False, None, 6, None), (False, None, 7, "after 6 optimiser steps, the weights are now at 7"),
        (False, None, 5, "now at 5"), (False, 8, 8, None), (False, 8, 9, "now at 9"), (False, 8, 6, None),
        (True, None, 6, "was trained on already"), (True, 8, 8, "was trained on already"),
    ],
)  # fmt: skip
def test_old_ones_are_refused(rollout, used, trained, now, refused):
    rollout.used, rollout.trained_version = used, trained
    if refused is None:
        rollout.require_fresh(now)
        return
    with pytest.raises(UsageError, match=refused):
        rollout.require_fresh(now)


def test_every_field_comes_back_from_the_disk(rollout, tmp_path):
    part = dataclasses.replace(rollout.keep([FIRST + 2, FIRST + 3]), used=True, trained_version=8, solver="sde")
    part.save(tmp_path / "r")
    found = Rollout.load(tmp_path / "r", "cpu")
    for field in dataclasses.fields(Rollout):
        one, other = getattr(found, field.name), getattr(part, field.name)
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other), field.name
            assert one.dtype == other.dtype, field.name
        else:
            assert one == other, field.name
    without = dataclasses.replace(rollout, finals=None)
    without.save(tmp_path / "s")
    assert Rollout.load(tmp_path / "s", "cpu").finals is None


def test_what_another_number_of_ranks_kept_is_refused(rollout, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"no rollout_00000\.json"):
        Rollout.load(tmp_path, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(rollout_module, "world_size", lambda: 2)
        rollout.save(tmp_path)
    with pytest.raises(CheckpointError, match="a rollout of 2 ranks, loaded on 1"):
        Rollout.load(tmp_path, "cpu")


@pytest.mark.parametrize("damage", ["tensors", "fewer", "more", "absent"])
def test_what_is_not_as_it_was_written_is_refused(rollout, tmp_path, damage):
    rollout.save(tmp_path)
    record, tensors = tmp_path / "rollout_00000.json", tmp_path / "rollout_00000.safetensors"
    if damage == "tensors":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "absent":
        tensors.unlink()
    else:
        given = json.loads(record.read_text())
        del given["record_sha256"]
        given["fields"] |= {"colour": 1} if damage == "more" else {}
        if damage == "fewer":
            del given["fields"]["seed"]
        record.write_bytes(sealed_json(given, "record_sha256"))
    says = {"more": "another version of fdfo_engine: colour", "fewer": "another version of fdfo_engine: seed"}
    with pytest.raises(CheckpointError, match=says.get(damage, r"rollout_00000\.safetensors: not as it was written")):
        Rollout.load(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("next_pair", "version", "taken"), [(FIRST, 6, True), (FIRST + 1, 6, False), (0, 6, False), (FIRST, 7, False)]
)
def test_what_waits_for_scores_is_taken_once_and_only_by_the_same_weights(
    rollout, tmp_path, capsys, next_pair, version, taken
):
    unscored = UnscoredRollout(tmp_path / "unscored")
    assert unscored.take(next_pair, version, CPU) is None
    unscored.keep(dataclasses.replace(rollout, weights_version=1))
    unscored.keep(rollout)
    assert [path.name for path in tmp_path.iterdir()] == ["unscored"]
    found = unscored.take(next_pair, version, CPU)
    assert (found is not None) == taken
    assert ("scoring again the 5 pairs" in capsys.readouterr().out) == taken
    assert not taken or torch.equal(found.images, rollout.images)
    assert list(tmp_path.iterdir()) == [], "whatever was kept is gone"
    assert unscored.take(next_pair, version, CPU) is None


def test_half_of_a_kept_one_is_none(rollout, tmp_path, monkeypatch, capsys):
    unscored = UnscoredRollout(tmp_path / "unscored")
    (tmp_path / "unscored.partial").mkdir()
    assert unscored.take(FIRST, 6, CPU) is None
    assert list(tmp_path.iterdir()) == []

    def refuses(self, folder):
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Rollout, "save", refuses)
    unscored.keep(rollout)
    assert "could not be kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
