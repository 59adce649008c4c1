"""SHA-256 taken once: against hashlib, and with the reading counted."""

import hashlib
import json
import os

import pytest

from fdfo_engine.runtime import content_hash
from fdfo_engine.runtime.content_hash import content_hashes
from fdfo_engine.runtime.durable import sha256_of
from fdfo_engine.runtime.environment import user_cache


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Files read so far, by name; every file counts as large and as settled, and the memory is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "REMEMBERED_FROM_BYTES", 1)
    monkeypatch.setattr(content_hash, "_SETTLED_AFTER_NS", 0)
    names = []

    def counted(path):
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(content_hash, "sha256_of", counted)
    return names


def written(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once(tmp_path, read):
    files = [written(tmp_path / name, name.encode()) for name in "abc"]
    wanted = [sha256(name) for name in (b"a", b"b", b"c")]
    assert content_hashes(files) == wanted
    assert content_hashes(files[::-1]) == wanted[::-1]
    assert sorted(read) == ["a", "b", "c"]
    assert content_hashes([]) == []


def test_a_relative_path_or_a_symlink_is_the_same_file(tmp_path, read, monkeypatch):
    written(tmp_path / "model/weights", b"w")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "model/weights", tmp_path / "link/weights", type(tmp_path)("link/../model/weights")):
        assert content_hashes([path]) == [sha256(b"w")]
    assert read == ["weights"]


def replaced_with_the_same_size_and_date(path):
    """As `cp --preserve` or `rsync --times` do."""
    before = path.stat()
    path.write_bytes(b"W" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def moved_in_place(path):
    other = written(path.with_name("other"), b"W" * path.stat().st_size)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [replaced_with_the_same_size_and_date, moved_in_place])
def test_a_file_that_changed_is_read_again(tmp_path, read, change):
    path = written(tmp_path / "weights", b"w" * 10)
    assert content_hashes([path]) == [sha256(b"w" * 10)]
    change(path)
    assert content_hashes([path]) == [sha256(b"W" * 10)]
    assert read == ["weights"] * 2


def test_a_file_that_may_still_change_unseen_is_not_remembered(tmp_path, read, monkeypatch):
    """Two writes within a tick of the filesystem's clock have the same time."""
    monkeypatch.setattr(content_hash, "_SETTLED_AFTER_NS", 3600 * 10**9)
    path = written(tmp_path / "weights", b"w")
    assert content_hashes([path]) == content_hashes([path]) == [sha256(b"w")]
    assert read == ["weights"] * 2


def test_small_files_are_never_taken_on_trust(tmp_path, read, monkeypatch):
    monkeypatch.setattr(content_hash, "REMEMBERED_FROM_BYTES", 100)
    path = written(tmp_path / "config.json", b"{}")
    content_hashes([path])
    content_hashes([path])
    assert read == ["config.json"] * 2
    assert not user_cache("hashes").exists()


def test_a_blob_of_the_hub_is_named_by_its_hash(tmp_path, read):
    blob = written(tmp_path / "models--x--y/blobs" / sha256(b"w" * 10), b"w" * 10)
    link = tmp_path / "models--x--y/snapshots/c0ffee/transformer/weights"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert content_hashes([link]) == [sha256(b"w" * 10)]
    assert read == []
    replaced_with_the_same_size_and_date(blob)
    assert content_hashes([link]) == [sha256(b"W" * 10)], "it is known to have changed since"
    assert read == ["weights"]


def test_a_blob_of_another_name_is_read(tmp_path, read):
    blob = written(tmp_path / "models--x--y/blobs" / hashlib.sha1(b"w").hexdigest(), b"w")
    elsewhere = written(tmp_path / "weights" / sha256(b"not this"), b"v")
    assert content_hashes([blob, elsewhere]) == [sha256(b"w"), sha256(b"v")]
    assert len(read) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"sha256": "0" * 64}),
        lambda text: json.dumps({"sha256": "0" * 64}),
    ],
)
def test_a_damaged_memory_is_no_memory(tmp_path, read, damage):
    path = written(tmp_path / "weights", b"w")
    content_hashes([path])
    (entry,) = user_cache("hashes").glob("*.json")
    entry.write_text(damage(entry.read_text()))
    assert content_hashes([path]) == [sha256(b"w")]
    assert content_hashes([path]) == [sha256(b"w")]
    assert read == ["weights"] * 2, "read again once, and then known again"


def test_storage_that_keeps_nothing_costs_a_warning_and_time(tmp_path, read, monkeypatch, capsys):
    written(tmp_path / "file", b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = written(tmp_path / "weights", b"w")
    assert content_hashes([path]) == content_hashes([path]) == [sha256(b"w")]
    assert read == ["weights"] * 2
    assert "its SHA-256 is not remembered" in capsys.readouterr().err


def test_a_missing_file_is_an_error(tmp_path, read):
    with pytest.raises(FileNotFoundError):
        content_hashes([tmp_path / "weights"])
