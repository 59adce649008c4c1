import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fdfo_engine.runtime.checkpoint import SCHEMA_VERSION, CheckpointStore
from fdfo_engine.runtime.durable import sealed_json
from fdfo_engine.runtime.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
FILES = ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


def contents(epoch):
    tensors = {"weights": {"a": torch.full((7, 3), float(epoch)), "b": torch.arange(5)}}
    return tensors | {"optimizer": {"m": torch.full((4,), -float(epoch))}}, {"epoch": epoch, "note": "é"}


def saved(folder, *epochs, keep=2):
    store = CheckpointStore(folder, keep)
    for epoch in epochs:
        store.save(f"epoch_{epoch:06d}", *contents(epoch))
    return store


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def subprocess_environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_what_was_saved_is_loaded(tmp_path):
    loaded = saved(tmp_path / "c", 1, 2).load()
    tensors, state = contents(2)
    assert (loaded.name, loaded.state) == ("epoch_000002", state)
    assert loaded.tensors.keys() == tensors.keys()
    for stem, group in tensors.items():
        for name, tensor in group.items():
            assert torch.equal(loaded.tensors[stem][name], tensor)
            assert loaded.tensors[stem][name].dtype == tensor.dtype


def test_a_large_group_is_cut_into_files_and_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("fdfo_engine.runtime.checkpoint.SHARD_BYTES", 100)
    sizes = {"a": 10, "b": 15, "alone": 60, "c": 25, "d": 1}  # float32: 40 + 60, 240, 100, 4 bytes
    group = {name: torch.full((n,), float(n)) for name, n in sizes.items()}
    store = CheckpointStore(tmp_path)
    folder = store.save("x", {"weights": group, "small": {"s": torch.ones(2)}}, {})
    shards = sorted(path.name for path in folder.glob("weights*"))
    assert shards == [f"weights-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert [len(load_file(folder / name)) for name in shards] == [2, 1, 1, 1]
    found = store.load().tensors
    assert found.keys() == {"weights", "small"}
    assert found["weights"].keys() == group.keys()
    assert all(torch.equal(found["weights"][name], group[name]) for name in group)
    (folder / shards[2]).unlink()
    with pytest.raises(CheckpointError, match=r"weights-00003-of-00004\.safetensors is missing"):
        store.load("x")
    with pytest.raises(ValueError, match="no shard's"):
        store.save("y", {"weights-00001-of-00002": group}, {})


def test_strided_and_bfloat16_tensors(tmp_path):
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T
    store = CheckpointStore(tmp_path)
    store.save("a", {"w": {"x": tensor}}, {"bad": float("nan")})
    assert torch.equal(store.load().tensors["w"]["x"], tensor)
    assert store.load().state == {"bad": None}


def test_empty_store_has_nothing(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert (store.names(), store.load(), store.load(strict=True)) == ([], None, None)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'epoch_000009'; found: none"):
        store.load("epoch_000009")


def test_keeps_the_newest(tmp_path):
    store = saved(tmp_path, 1, 2, 10, 11, keep=3)
    assert store.names() == ["epoch_000002", "epoch_000010", "epoch_000011"]
    assert sorted(p.name for p in tmp_path.iterdir()) == store.names()
    assert store.load("epoch_000002").state["epoch"] == 2
    with pytest.raises(ValueError, match="keep = 1"):
        CheckpointStore(tmp_path, keep=1)


@pytest.mark.parametrize("file", FILES)
def test_truncated_file_falls_back(tmp_path, file, capsys):
    store = saved(tmp_path, 1, 2)
    path = tmp_path / "epoch_000002" / file
    size = path.stat().st_size
    for kept in (0, 1, size // 2, size - 1):
        path.write_bytes(path.read_bytes()[:kept].ljust(kept))
        assert store.load().state["epoch"] == 1
        printed = capsys.readouterr()
        assert str(path) in printed.err
        assert str(kept) in printed.err
        assert "resuming from checkpoint epoch_000001" in printed.out
    with pytest.raises(CheckpointError, match=file):
        store.load(strict=True)
    with pytest.raises(CheckpointError, match=file):
        store.load("epoch_000002")


@pytest.mark.parametrize("file", FILES)
def test_a_link_in_place_of_a_file_is_noticed(tmp_path, file):
    """Even to the same bytes: what it points at may change, or go with another checkpoint."""
    store = saved(tmp_path / "run", 1, 2)
    path = tmp_path / "run" / "epoch_000002" / file
    path.rename(tmp_path / file)
    path.symlink_to(tmp_path / file)
    assert store.load().state["epoch"] == 1
    with pytest.raises(CheckpointError, match=file):
        store.load(strict=True)


@pytest.mark.parametrize("file", FILES)
def test_flipped_bit_is_noticed(tmp_path, file):
    store = saved(tmp_path, 1, 2)
    path = tmp_path / "epoch_000002" / file
    size = path.stat().st_size
    positions = range(size) if file == "manifest.json" else range(0, size, 7)
    for position in positions:
        flip(path, position, bit=position % 8)
        assert store.load().state["epoch"] == 1, position
        flip(path, position, bit=position % 8)
    assert store.load(strict=True).state["epoch"] == 2


@pytest.mark.parametrize("file", FILES)
def test_missing_file_falls_back(tmp_path, file, capsys):
    store = saved(tmp_path, 1, 2)
    (tmp_path / "epoch_000002" / file).unlink()
    assert store.load().state["epoch"] == 1
    assert f"{file} is missing" in capsys.readouterr().err


def test_hash_mismatch_names_both(tmp_path, capsys):
    store = saved(tmp_path, 1, 2)
    flip(tmp_path / "epoch_000002" / "weights.safetensors", -1)
    store.load()
    message = capsys.readouterr().err
    assert message.count("SHA-256") == 1
    assert "was written with" in message


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    store = saved(tmp_path, 1, 2)
    for name in store.names():
        (tmp_path / name / "state.json").write_text("")
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert all(name in str(caught.value) for name in store.names())
    assert caught.value.exit_code == 7


def test_newer_schema_is_refused(tmp_path):
    store = saved(tmp_path, 1, 2)
    path = tmp_path / "epoch_000002" / "manifest.json"
    manifest = json.loads(path.read_bytes()) | {"schema_version": SCHEMA_VERSION + 1, "fdfo_engine": "9.9"}
    del manifest["manifest_sha256"]
    path.write_bytes(sealed_json(manifest, "manifest_sha256"))
    with pytest.raises(CheckpointError, match=r"schema 2, .* up to 1: install fdfo-engine 9\.9"):
        store.load()


def test_manifest_cannot_point_outside(tmp_path):
    store = saved(tmp_path, 1, 2)
    path = tmp_path / "epoch_000002" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["manifest_sha256"]
    manifest["files"]["../../secret.safetensors"] = manifest["files"]["weights.safetensors"]
    path.write_bytes(sealed_json(manifest, "manifest_sha256"))
    with pytest.raises(CheckpointError, match="outside its folder"):
        store.load(strict=True)


@pytest.mark.parametrize("name", ["../x", ".hidden", "a/b", "", "a b"])
def test_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="takes letters"):
        CheckpointStore(tmp_path).save(name, {}, {})
    with pytest.raises(ValueError, match="takes letters"):
        CheckpointStore(tmp_path).save("a", {name: {}}, {})


def test_leftovers_of_a_killed_writer_go_at_the_next_save(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / ".tmp-epoch_000003-77").mkdir()
    (tmp_path / ".tmp-epoch_000003-77" / "weights.safetensors").write_text("half")
    (tmp_path / ".removed-epoch_000000").mkdir()
    store = CheckpointStore(tmp_path)
    assert store.load().state["epoch"] == 2
    assert (tmp_path / ".tmp-epoch_000003-77").exists(), "a reader must not touch what another process may be writing"
    store.save("epoch_000003", *contents(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_000002", "epoch_000003"]


def test_saving_a_name_again_replaces_it(tmp_path):
    store = saved(tmp_path, 1, 2)
    store.save("epoch_000002", *contents(22))
    assert store.load().state["epoch"] == 22
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_000001", "epoch_000002"]


def test_replacement_killed_between_its_renames(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "epoch_000002").rename(tmp_path / ".replaced-epoch_000002")
    assert CheckpointStore(tmp_path).load().state["epoch"] == 2
    assert saved(tmp_path, 3).names() == ["epoch_000002", "epoch_000003"]


def test_going_on_from_an_earlier_one_drops_the_later(tmp_path, capsys):
    store = saved(tmp_path, 1, 2, 9, keep=3)
    store.save("epoch_000003", *contents(3))
    assert store.names() == ["epoch_000001", "epoch_000002", "epoch_000003"]
    assert "epoch_000009 removed" in capsys.readouterr().out


def test_failed_deletion_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    store = saved(tmp_path, 1, 2)

    def refuse(*_args, **_kwargs):
        raise OSError(16, "Device or resource busy")

    original = Path.rename
    monkeypatch.setattr(Path, "rename", lambda p, to: refuse() if p.name == "epoch_000001" else original(p, to))
    store.save("epoch_000003", *contents(3))
    assert "epoch_000001 could not be removed: Device or resource busy" in capsys.readouterr().err
    assert store.load().state["epoch"] == 3


def test_room_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    store = saved(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 37_000_000))
    with pytest.raises(CheckpointError, match=r"no space left on .*: need 41.1 MB, 37 MB free"):
        store.save("epoch_000002", {"w": {"x": torch.zeros(10_000_000)}}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_000001"]


DISK_FULL = """
import shutil, sys
import torch
from fdfo_engine.runtime.checkpoint import CheckpointStore
from fdfo_engine.runtime.durable import append_line, replace_file
from fdfo_engine.runtime.errors import CheckpointError, report_and_exit_code
from pathlib import Path

folder = Path(sys.argv[1])
store = CheckpointStore(folder / "c")
store.save("a", {"w": {"x": torch.ones(100)}}, {"n": 1})
append_line(folder / "m.jsonl", {"epoch": 1})
replace_file(folder / "status.json", b"old")
report = shutil.disk_usage(folder)
shutil.disk_usage = lambda _: type(report)(10**12, 0, 10**12)  # the check passes, the disk still fills up
for attempt in (
    lambda: store.save("b", {"w": {"x": torch.ones(2_000_000)}}, {"n": 2}),
    lambda: append_line(folder / "m.jsonl", {"epoch": 2, "text": "x" * 8_000_000}),
    lambda: replace_file(folder / "status.json", b"y" * 8_000_000),
):
    try:
        attempt()
    except CheckpointError as error:
        assert report_and_exit_code(error) == 7
    else:
        sys.exit("the disk was not full")
assert store.names() == ["a"] and store.load(strict=True).state == {"n": 1}
assert [p.name for p in (folder / "c").iterdir()] == ["a"]
assert (folder / "m.jsonl").read_text() == '{"epoch": 1}\\n'
assert (folder / "status.json").read_bytes() == b"old"
assert not list(folder.glob(".tmp*"))
print("intact")
"""


def test_full_disk_leaves_everything_intact(tmp_path):
    probe = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True)
    if probe.returncode:
        pytest.skip(f"no private mount here: {probe.stderr.decode().strip()}")
    script = f'mount -t tmpfs -o size=4m none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    command = ["unshare", "-Urm", "sh", "-c", script, DISK_FULL]
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment())
    assert done.stdout == "intact\n", done.stderr
    assert done.stderr.count("no space left on") == 3


def harness(folder, kills, kind):
    command = [sys.executable, str(Path(__file__).parent / "kill_harness.py"), str(folder), str(kills), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), check=True)
    return json.loads(done.stdout)


def assert_nothing_lost(counts):
    assert counts["saves"] > counts["kills"] / 4, "the children were killed before they saved anything"
    assert (counts["unloadable"], counts["torn"], counts["lost"]) == (0, 0, 0), counts


def test_kills_during_saves_lose_nothing(tmp_path):
    assert_nothing_lost(harness(tmp_path / "c", 15, "store"))


@pytest.mark.slow
def test_300_kills_lose_nothing(tmp_path):
    assert_nothing_lost(harness(tmp_path / "c", 300, "store"))


@pytest.mark.slow
def test_the_harness_catches_a_writer_in_place(tmp_path):
    counts = harness(tmp_path / "c", 100, "naive")
    assert counts["unloadable"] + counts["torn"] > 10, counts


def test_the_newest_state_is_known_without_its_tensors(tmp_path, monkeypatch):
    store = saved(tmp_path, 1, 2)
    monkeypatch.setattr("safetensors.torch.load_file", None)
    assert store.newest_state() == {"epoch": 2, "note": "é"}
    path = tmp_path / "epoch_000002" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert store.newest_state() is None
    assert CheckpointStore(tmp_path / "nowhere").newest_state() is None


def test_a_pinned_one_stays_beside_the_newest_until_it_is_let_go(tmp_path):
    for epoch in (1, 2, 3, 4, 5):
        CheckpointStore(tmp_path, 2, ["epoch_000002"]).save(f"epoch_{epoch:06d}", *contents(epoch))
    assert CheckpointStore(tmp_path).names() == ["epoch_000002", "epoch_000004", "epoch_000005"]
    assert CheckpointStore(tmp_path).newest_state()["epoch"] == 5
    saved(tmp_path, 6)
    assert CheckpointStore(tmp_path).names() == ["epoch_000005", "epoch_000006"]


def test_one_set_aside_goes_where_its_successor_is_there(tmp_path):
    """Killed after the second of its two renames: the new one counts, the old one is removed at the next save."""
    saved(tmp_path, 1, 2)
    (tmp_path / "epoch_000002").rename(tmp_path / ".replaced-epoch_000002")
    CheckpointStore(tmp_path / "other").save("epoch_000002", *contents(22))
    (tmp_path / "other" / "epoch_000002").rename(tmp_path / "epoch_000002")
    (tmp_path / "other").rmdir()
    store = CheckpointStore(tmp_path)
    assert store.load().state["epoch"] == 22
    store.save("epoch_000003", *contents(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_000002", "epoch_000003"]
    assert store.load("epoch_000002").state["epoch"] == 22


def test_weights_that_are_trained_are_saved_without_their_graph(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    store = CheckpointStore(tmp_path)
    store.save("a", {"w": {"x": weight, "y": (2 * weight).T}}, {})
    found = store.load().tensors["w"]
    assert torch.equal(found["x"], weight.detach())
    assert torch.equal(found["y"], 2 * weight.detach().T)
