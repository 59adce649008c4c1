"""A hub's cache on disk, as huggingface_hub lays it out: blobs by hash, snapshots of symlinks, refs; no network."""

import hashlib
from pathlib import Path

import huggingface_hub.constants

LARGE_BYTES = 5_000
"""As on the hub, weights lie in large-file storage, whose blobs are named by SHA-256; small files' by git's SHA-1."""


def use_cache(monkeypatch, cache):
    """Makes `cache` the hub's cache of this process, and the hub out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def publish(cache, repository, folder, *, branch="main"):
    """Commits the files of `folder` to `repository` and moves `branch` there; returns the snapshot's folder."""
    root = Path(cache) / f"models--{repository.replace('/', '--')}"
    files = {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    commit = hashlib.sha1(b"".join(str(name).encode() + data for name, data in files.items())).hexdigest()
    snapshot = root / "snapshots" / commit
    for name, data in files.items():
        blob = root / "blobs" / blob_name(data)
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + len(name.parts) - 1)) / "blobs" / blob.name)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return snapshot


def blob_name(data):
    """SHA-256 of a large file; of a small one SHA-1 as git takes it."""
    if len(data) >= LARGE_BYTES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
