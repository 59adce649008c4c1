"""What is on the disk when: the order of writing, syncing and renaming, which no kill of a process can show."""

import errno
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from fdfo_engine.runtime import durable
from fdfo_engine.runtime.checkpoint import SHARD_BYTES, CheckpointStore, checkpoint_name
from fdfo_engine.runtime.durable import (
    append_line,
    append_whole,
    open_to_readers,
    plain_json,
    replace_file,
    require_room,
    sealed_json,
    sha256_of,
    storage_error,
    unsealed_json,
)
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.event_log import EventLog
from fdfo_engine.runtime.events import Caution, Checkpoint, EventStream, Phase
from fdfo_engine.runtime.rank_files import RankFile
from fdfo_engine.runtime.run_lock import SILENCE_S, RunLock
from fdfo_engine.runtime.run_status import HEARTBEAT_S


@pytest.fixture
def calls(monkeypatch):
    """What is synced, renamed and removed, in order: (verb, name), a folder's name ending in a slash."""
    made, fsync, rename, rmtree = [], os.fsync, Path.rename, shutil.rmtree

    def noted(verb, path):
        made.append((verb, f"{path.name}/" if path.is_dir() else path.name))

    def watched_fsync(descriptor):
        noted("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_rename(self, target, how=rename):
        noted("rename", self)
        return how(self, target)

    def watched_rmtree(path, *words, **more):
        noted("remove", Path(path))
        rmtree(path, *words, **more)

    replace = Path.replace
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    monkeypatch.setattr(Path, "replace", lambda self, target: watched_rename(self, target, replace))
    monkeypatch.setattr(shutil, "rmtree", watched_rmtree)
    return made


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_its_name_before_that_is_told(tmp_path, calls):
    folder = tmp_path / "run"
    folder.mkdir()
    replace_file(folder / "status.json", b"new")
    temporary = f".tmp-status.json-{os.getpid()}"
    assert calls == [("sync", temporary), ("rename", temporary), ("sync", "run/")]


def test_a_checkpoint_is_whole_before_it_has_its_name_and_has_it_before_an_older_one_goes(tmp_path, calls):
    store = CheckpointStore(tmp_path / "store")
    tensors = {"weights": {"a": torch.ones(3)}, "optimizer": {"m": torch.ones(3)}}
    for epoch in (1, 2):
        store.save(checkpoint_name(epoch), tensors, {"epoch": epoch})
    calls.clear()
    store.save(checkpoint_name(3), tensors, {"epoch": 3})
    temporary = f".tmp-epoch_000003-{os.getpid()}/"
    named = calls.index(("rename", temporary))
    before = [name for verb, name in calls[:named] if verb == "sync"]
    assert sorted(before[:-1]) == ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert before[-2:] == ["manifest.json", temporary], "what it lists comes before the list, and the folder last"
    assert calls[named + 1] == ("sync", "store/")
    assert calls[named + 2 :] == [("rename", "epoch_000001/"), ("remove", ".removed-epoch_000001/")]


def test_one_of_the_same_name_goes_when_the_new_one_is_there(tmp_path, calls):
    store = CheckpointStore(tmp_path / "store")
    store.save("epoch_000001", {}, {"n": 1})
    calls.clear()
    store.save("epoch_000001", {}, {"n": 2})
    moves = [call for call in calls if call[0] != "sync" or call[1] == "store/"]
    assert moves == [
        ("rename", "epoch_000001/"), ("rename", f".tmp-epoch_000001-{os.getpid()}/"), ("sync", "store/"),
        ("remove", ".replaced-epoch_000001/"),
    ]  # fmt: skip


def test_an_event_that_counts_is_synced_and_progress_is_not(tmp_path, calls):
    log = EventLog(tmp_path)
    stream = EventStream([log])
    for data in (Phase(epoch=1, name="rollout", done=1), Caution(epoch=1, message="x")):
        calls.clear()
        stream.tell(data)
        assert calls == ([] if data.type == "phase" else [("sync", "events.jsonl")])
    calls.clear()
    stream.tell(Checkpoint(epoch=1, name="epoch_000001"))
    append_line(tmp_path / "metrics.jsonl", {"epoch": 1, "loss": math.inf})
    assert calls == [("sync", "events.jsonl"), ("sync", "metrics.jsonl")]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"epoch": 1, "loss": null}\n'
    log.close()


@pytest.mark.parametrize("fault", ["short", "full", "sync"])
def test_half_a_line_is_taken_back(tmp_path, monkeypatch, fault):
    file = tmp_path / "log"
    file.write_bytes(b"one\n")
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    write, full = os.write, OSError(errno.ENOSPC, "No space left on device")

    def refuses(*_):
        raise full

    if fault == "short":
        monkeypatch.setattr(os, "write", lambda where, data: write(where, data[:2]))
    elif fault == "full":
        monkeypatch.setattr(os, "write", lambda where, data: write(where, data[:2]) and refuses())
    else:
        monkeypatch.setattr(os, "fsync", refuses)
    with pytest.raises(OSError, match=r"short write|No space"):
        append_whole(descriptor, b"two\n", 4)
    os.close(descriptor)
    assert file.read_bytes() == b"one\n"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "plain"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_may_be_read_by_whom_the_umask_lets(tmp_path, umask, plain):
    before = os.umask(umask)
    try:
        path = CheckpointStore(tmp_path / "c").save("a", {"weights": {"a": torch.ones(3)}}, {})
        replace_file(tmp_path / "status.json", b"{}")
        EventLog(tmp_path).close()
        lock = RunLock(tmp_path)
        lock.take()
        lock.release()
        RankFile(tmp_path, 0).close()
    finally:
        os.umask(before)
    written = [*path.iterdir(), tmp_path / "status.json"]
    assert {file.name: mode(file) for file in written} == {file.name: plain for file in written}
    ours = [tmp_path / "events.jsonl", tmp_path / "run.lock", tmp_path / "ranks/rank_0000.json"]
    assert {file.name: mode(file) for file in ours} == {file.name: 0o644 & ~umask for file in ours}, (
        "written by us alone"
    )


def test_only_tensors_are_opened_to_readers(tmp_path):
    for name in ("w.safetensors", "secret.json"):
        (tmp_path / name).touch(mode=0o600)
    before = os.umask(0o022)
    open_to_readers(tmp_path)
    os.umask(before)
    assert (mode(tmp_path / "w.safetensors"), mode(tmp_path / "secret.json")) == (0o644, 0o600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.json", "w.safetensors"]


def test_a_seal_breaks_with_any_other_byte_and_any_other_key(tmp_path):
    file, record = tmp_path / "r.json", {"b": [1, None], "a": "\u00e9"}
    file.write_bytes(sealed_json(record, "seal"))
    assert unsealed_json(file, "seal") == record
    whole = file.read_bytes()
    assert json.loads(whole).keys() == {"a", "b", "seal"}
    spoilt = [
        whole.replace(b"[\n  1", b"[\n  2"), whole + b" ", whole.replace(b"\n", b""), b"[]", b"3", b"{}", b"",
        json.dumps(record).encode(), b"\xff" + whole,
    ]  # fmt: skip
    for data in spoilt:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"not as it was written|no record of ours"):
            unsealed_json(file, "seal")


def test_plain_json_is_what_every_reader_takes():
    given = {1: (math.nan, -math.inf, 2.5), "x": [{"y": math.inf}], "z": True, None: "text"}
    assert plain_json(given) == {"1": [None, None, 2.5], "x": [{"y": None}], "z": True, "None": "text"}


def test_room_is_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 2_340_000))
    require_room(tmp_path, 2_340_000)
    with pytest.raises(CheckpointError, match=r"need 2.4 MB, 2.4 MB free"):
        require_room(tmp_path, 2_340_001)
    file = tmp_path / "f"
    file.touch()
    for code in (errno.ENOSPC, errno.EDQUOT):
        assert str(storage_error(file, OSError(code, "x"))) == f"no space left on {tmp_path}: 2.4 MB free"
    assert str(storage_error(tmp_path, ValueError("os error 28"))).startswith(f"no space left on {tmp_path}: ")
    assert (
        str(storage_error(file, OSError(errno.EIO, "Input/output error"))) == f"cannot write {file}: Input/output error"
    )
    assert str(storage_error(file, ValueError("odd"))) == f"cannot write {file}: odd"


def test_a_folder_that_cannot_be_synced_need_not_be(tmp_path, monkeypatch):
    def refuses(code):
        def fsync(_):
            raise OSError(code, "refused")

        monkeypatch.setattr(os, "fsync", fsync)

    refuses(errno.EINVAL)
    durable.sync_folder(tmp_path)
    refuses(errno.EIO)
    with pytest.raises(OSError, match="refused"):
        durable.sync_folder(tmp_path)


def test_a_hash_is_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_CHUNK_BYTES", 3)
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "f").write_bytes(b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")
    assert sha256_of(tmp_path / "f") == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"


def test_the_figures_that_no_run_can_show():
    """A file of at most 5 GB, a sign of life every three seconds, five of which another host is waited for."""
    assert (SHARD_BYTES, HEARTBEAT_S, SILENCE_S) == (5_000_000_000, 3.0, 15.0)
    assert [checkpoint_name(epoch) for epoch in (0, 7, 123456)] == ["epoch_000000", "epoch_000007", "epoch_123456"]
