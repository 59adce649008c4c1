"""A run's folder: settings, lock, status, and logs that end where the checkpoint does. For rank 0."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from pydantic import ValidationError

from fdfo_engine.config import Config, dump_config, load_config, resumable_keys, with_named_servers
from fdfo_engine.runtime.base_record import BaseRecord, recorded_base, write_base
from fdfo_engine.runtime.checkpoint import CheckpointStore
from fdfo_engine.runtime.console import say, warn
from fdfo_engine.runtime.durable import remove_leftovers, replace_file, require_room, storage_error, write_synced
from fdfo_engine.runtime.environment import describe_environment
from fdfo_engine.runtime.errors import CheckpointError, PromptError, UsageError
from fdfo_engine.runtime.event_log import truncate_events
from fdfo_engine.runtime.json_text import json_object
from fdfo_engine.runtime.lost_checkpoints import refuse_lost_checkpoints
from fdfo_engine.runtime.run_lock import RunLock
from fdfo_engine.runtime.run_status import RunStatus

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
ENVIRONMENT_NAME = "environment.json"
PROMPTS_NAME = "prompts.sha256"
BASE_LOCATION = ("model.id", "model.revision", "model.variant")
"""Settings that say where the base model lies, not what it is."""

_CHECKPOINTS_NAME = "checkpoints"
_RUNS_SHOWN = 12
_RESTORE = "restore it or choose another folder"
_TRACES = (METRICS_NAME, _CHECKPOINTS_NAME)


class RunFolder:
    """An opened and locked run folder; close it, or use it as a context manager.

    Attributes:
        path: the folder.
        status: what frontends read, `status.json`.
    """

    def __init__(self, path: Path, lock: RunLock) -> None:
        self.path = path
        self.status = RunStatus(path)
        self._lock = lock

    @classmethod
    def open(
        cls, path: Path | str, config_text: str, *, base: BaseRecord | None = None, has_moved: bool = False,
        may_change: Iterable[str] = (),
    ) -> RunFolder:  # fmt: skip
        """Makes the folder, or opens the one of the same run; locks it and probes its storage.

        Args:
            path: `run.dir`.
            config_text: the resolved settings as YAML, written to `config.yaml`; the machine goes to
                `environment.json`.
            may_change: dotted keys (`run.epochs`), or whole sections (`log`), that an existing run may be given anew;
                `config.yaml` is then replaced.
            base: the base model, kept in a new run and held against an old one's: where it is the same, it may lie
                elsewhere (`model.id`, `model.revision`). None for a model that has no record.
            has_moved: the base of an old run that recorded none may lie elsewhere too, and is taken on trust.

        Raises:
            UsageError: another process has the folder (names it), it was made with other settings (names the keys),
                or it holds a run without settings. Nothing in it was changed.
            CheckpointError: its settings are damaged, it began with another base model (names the files that differ),
                all checkpoints that it has saved are gone, or the storage cannot be written.
        """
        path = Path(path)
        _make(path)
        lock = RunLock(path)
        lock.take()
        try:
            probe_storage(path)
            remove_leftovers(path)
            record_config(path, config_text, base=base, has_moved=has_moved, may_change=may_change)
            refuse_lost_checkpoints(path, checkpoint_store(path))
            replace_file(path / ENVIRONMENT_NAME, json.dumps(describe_environment(), indent=1).encode())
        except BaseException:
            lock.release()
            raise
        return cls(path, lock)

    @classmethod
    def of(cls, config: Config, base: BaseRecord | None, *, has_moved: bool = False) -> RunFolder:
        """`open` of the run that `config` describes, with what may change in it."""
        may_change = resumable_keys(config)
        return cls.open(config.run.dir, dump_config(config), base=base, has_moved=has_moved, may_change=may_change)

    def truncate_logs(self, epoch: int) -> None:
        """Drops records after `epoch`, and a half-written last line, from metrics, evaluations and events."""
        for name in (METRICS_NAME, EVALUATIONS_NAME):
            truncate_log(self.path / name, epoch)
        truncate_events(self.path, epoch)

    def require_prompts(self, sha256: str, may_change: bool = False) -> None:
        """Keeps the hash of a new run's prompt list, and holds that of an old run against it, or says that it changes.

        Raises:
            PromptError: the run began with other prompts.
        """
        file = self.path / PROMPTS_NAME
        if not file.is_file():
            replace_file(file, sha256.encode())
        elif file.read_bytes() != sha256.encode() and may_change:
            warn(f"{self.path}: goes on with other prompts than it began with")
            replace_file(file, sha256.encode())
        elif file.read_bytes() != sha256.encode():
            raise PromptError(
                f"prompts.source: not the prompts that the run in {self.path} began with; restore them, choose "
                "another run.dir, or pass --allow-prompt-change"
            )

    def require_room(self, num_bytes: int) -> None:
        """Checks that the storage has `num_bytes` left.

        Raises:
            CheckpointError: it has less; says how much of both.
        """
        require_room(self.path, num_bytes)

    def close(self) -> None:
        """Gives up the lock."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stored_config(path: Path | str) -> str | None:
    """The resolved settings of the run in `path` as YAML text, or None if there is no run.

    Raises:
        CheckpointError: they are no text.
    """
    file = Path(path) / CONFIG_NAME
    try:
        return file.read_bytes().decode() if file.is_file() else None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: damaged: {error}; {_RESTORE}") from error


def checkpoint_store(path: Path | str, keep: int = 2, pinned: Collection[str] = ()) -> CheckpointStore:
    """The checkpoints of the run in `path`; `keep` and `pinned` are for who saves."""
    return CheckpointStore(Path(path) / _CHECKPOINTS_NAME, keep, pinned)


def run_config(path: Path | str, base: Path | str | None = None) -> Config:
    """The settings of the run in `path`, as the folder is named here even if it was moved.

    Args:
        path: the run's folder.
        base: where its base model lies now, if not at `model.id`.

    Raises:
        CheckpointError: no run there.
        ConfigError: `config.yaml` is not valid any more; names file and line.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(f"{path}: no run there (no {CONFIG_NAME}){runs_beside(path)}")
    config = load_config(file)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(path)})})
    return config if base is None else config.with_base(base)


def runs_beside(path: Path | str) -> str:
    """The end of a message that `path` is no run folder: the runs that lie where it should; empty where none do."""
    parent = Path(path).parent
    runs = sorted(file.parent.name for file in parent.glob(f"*/{CONFIG_NAME}"))
    if not runs:
        return ""
    more = f" and {len(runs) - _RUNS_SHOWN} more" if len(runs) > _RUNS_SHOWN else ""
    return f"; runs in {parent}: {', '.join(runs[:_RUNS_SHOWN])}{more}"


def record_config(
    path: Path, given: str, *, base: BaseRecord | None = None, has_moved: bool = False, may_change: Iterable[str] = ()
) -> None:
    """Writes the settings and base of a new run, or holds those of an old one against them; see `RunFolder.open`."""
    stored = stored_config(path)
    if stored is None:
        _begin(path, given, base)
        return
    recorded = recorded_base(path)
    changes = _changes(path, stored, given)
    is_located_by_content = base is not None and (recorded is not None or has_moved)
    _refuse_other_settings(path, changes, (*may_change, *(BASE_LOCATION if is_located_by_content else ())))
    require_recorded(path, base)
    if base is not None and recorded is None:
        write_base(path, base)
    if changes:
        say("settings changed for the rest of the run: " + "; ".join(f"{k}: {v}" for k, v in changes.items()))
        replace_file(path / CONFIG_NAME, given.encode())


def _begin(path: Path, given: str, base: BaseRecord | None) -> None:
    """Writes the settings and the base of a new run."""
    traces = [name for name in _TRACES if (path / name).exists()]
    if traces:
        raise UsageError(f"run.dir = {path}: holds {', '.join(traces)} but no {CONFIG_NAME}; choose another folder")
    _make(path)
    if base is not None:
        write_base(path, base)
    replace_file(path / CONFIG_NAME, given.encode())


def _changes(path: Path, stored: str, given: str) -> dict[str, str]:
    try:
        return differing_settings(stored, given)
    except yaml.YAMLError as error:
        what = str(error).replace("\n", " ")
        raise CheckpointError(f"{path / CONFIG_NAME}: damaged: {what}; {_RESTORE}") from error


def _refuse_other_settings(path: Path, changes: dict[str, str], allowed: tuple[str, ...]) -> None:
    refused = [f"  {key}: {change}" for key, change in changes.items() if not _is_under(key, allowed)]
    if refused:
        raise UsageError("\n".join([f"run.dir = {path}: made with other settings; choose another folder", *refused]))


def require_recorded(path: Path | str, base: BaseRecord | None) -> None:
    """Holds the base model that is about to be used against the one that the run in `path`, if any, recorded.

    A run of a version that recorded none says so, and takes it on trust. A run that has no checkpoint yet, such as one
    whose base was broken, has nothing that belongs to the recorded one: it takes the other, and says so.

    Raises:
        CheckpointError: they differ; names the files.
    """
    recorded = recorded_base(path)
    if base is None:
        return
    if recorded is not None and recorded.sha256 != base.sha256 and not checkpoint_store(path).names():
        say(f"{path}: no checkpoint belongs to its recorded base model; it is now {base}")
        write_base(Path(path), base)
    elif recorded is not None:
        recorded.require_same(base, path)
    elif stored_config(path) is not None:
        say(f"{path}: what its base model was is not recorded; {base} is taken on trust")


def differing_settings(stored: str, given: str, under: tuple[str, ...] | None = None) -> dict[str, str]:
    """Dotted keys whose values differ between two settings texts, each with both values as text.

    A key that only one of them has counts as at its default in the other: a later version has more keys. `under` looks
    at these keys and sections only.
    """
    old, new = (_leaves(_whole(with_named_servers(yaml.safe_load(text)))) for text in (stored, given))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key, ...) != new.get(key, ...))
    return {
        key: f"{_shown(old, key)} there, {_shown(new, key)} given"
        for key in keys
        if under is None or _is_under(key, under)
    }


def _whole(tree: Any) -> Any:
    """`tree` with every key, where it is valid."""
    try:
        return Config.model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def probe_storage(folder: Path) -> None:
    """Writes, syncs and deletes a small file in `folder`.

    Raises:
        CheckpointError: any of the three fails.
    """
    probe = folder / ".probe"
    try:
        write_synced(probe, b"fdfo" * 1024)
        probe.unlink()
    except OSError as error:
        raise storage_error(folder, error) from error


def truncate_log(path: Path, epoch: int) -> None:
    """Keeps the whole JSON lines of `path` whose `epoch` is at most `epoch`; replaces the file atomically.

    A line that is not JSON or has no epoch is dropped with a warning; a missing file is left missing.
    """
    if not path.is_file():
        return
    data = path.read_bytes()
    kept = b"".join(line for line in data.splitlines(keepends=True) if _belongs(line, epoch, path))
    if kept != data:
        replace_file(path, kept)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a log, oldest first; of a run still going, or killed, the half-written last one is not.

    A missing file has none.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    records = [_parsed(line) for line in lines if line.endswith(b"\n")]
    return [record for record in records if record is not None]


def _belongs(line: bytes, epoch: int, path: Path) -> bool:
    if not line.endswith(b"\n"):
        return False
    record = _parsed(line)
    if record is None or not isinstance(record.get("epoch"), int):
        warn(f"{path}: dropped a damaged line of {len(line)} bytes")
        return False
    return bool(record["epoch"] <= epoch)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return json_object(line)
    except ValueError:
        return None


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"run.dir = {path}: is a file") from error
    except OSError as error:
        raise storage_error(path, error) from error


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every value under its dotted key; of a list the entries, where one of them is a mapping."""
    if isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _shown(leaves: dict[str, Any], key: str) -> str:
    return json.dumps(leaves[key], default=str) if key in leaves else "absent"
