"""What a base model is, by content: kept in a run's folder, its checkpoints and its exports, and compared later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.json_text import json_object

BASE_NAME = "base.json"
_SHOWN = 5


@dataclass(frozen=True)
class BaseFile:
    """A file's size in bytes and SHA-256: of its content, or of what a config says, without versions and paths."""

    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size} bytes, SHA-256 {self.sha256[:16]}"


@dataclass(frozen=True)
class BaseRecord:
    """The files that a base model's outputs depend on.

    Attributes:
        name: the hub's id, or the folder: what people call it; not compared.
        commit: of the hub; not compared, since a commit may change nothing but a README.
        files: each by its path in the pipeline's folder.
    """

    name: str
    commit: str | None
    files: Mapping[str, BaseFile]

    @property
    def sha256(self) -> str:
        """One hash of all files: equal where the model is."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def text(self) -> str:
        """What is compared, a line a file."""
        return "\n".join(f"{name} {self.files[name].sha256}" for name in sorted(self.files))

    def __str__(self) -> str:
        at = "" if self.commit is None else f" at commit {self.commit}"
        return f"{self.name}{at} (SHA-256 {self.sha256[:16]})"

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        files = {name: [file.size, file.sha256] for name, file in sorted(self.files.items())}
        return {"name": self.name, "commit": self.commit, "sha256": self.sha256, "files": files}

    @classmethod
    def from_json(cls, value: Any, where: Path | str) -> BaseRecord:
        """Reads what `as_json` gave; `where` it lies is for the message.

        Raises:
            CheckpointError: it is not as it was written.
        """
        try:
            files = {str(name): BaseFile(int(size), str(digest)) for name, (size, digest) in value["files"].items()}
            record = cls(str(value["name"]), value["commit"], files)
            is_whole = record.sha256 == value["sha256"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{where}: is no record of a base model: {error!r}") from error
        if not is_whole:
            raise CheckpointError(f"{where}: the record of its base model is damaged")
        return record

    def require_same(self, given: BaseRecord, where: Path | str) -> None:
        """Holds the base model `given` against this one, which is recorded `where`.

        Raises:
            CheckpointError: they differ; names the files, and what was recorded of each.
        """
        names = sorted(self.files.keys() | given.files.keys())
        differing = [name for name in names if not self._agrees(given, name)]
        if not differing:
            return
        lines = [
            f"  {name}: {self.files.get(name, 'absent')} recorded, {given.files.get(name, 'absent')} given"
            for name in differing[:_SHOWN]
        ]
        more = [f"  and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
        head = f"{where}: of another base model: {len(differing)} of {len(names)} files differ"
        both = f"  recorded: {self}; given: {given}"
        raise CheckpointError("\n".join([head, *lines, *more, both, f"  {self._way_back(given)}"]))

    def _way_back(self, given: BaseRecord) -> str:
        if self.commit is None or self.commit == given.commit:
            return "restore it, or say where the recorded one lies: --base PATH"
        fetch = f"hf download {self.name} --revision {self.commit}"
        return f"`{fetch}` prints a folder with the recorded one: --base FOLDER"

    def _agrees(self, given: BaseRecord, name: str) -> bool:
        own, other = self.files.get(name), given.files.get(name)
        return own is not None and other is not None and own.sha256 == other.sha256


def recorded_base(folder: Path | str) -> BaseRecord | None:
    """The base model of the run, or of the export, in `folder`; None where none was recorded.

    Raises:
        CheckpointError: the record is damaged.
    """
    file = Path(folder) / BASE_NAME
    if not file.is_file():
        return None
    try:
        value = json_object(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: is no record of a base model: {error}") from error
    return BaseRecord.from_json(value, file)


def write_base(folder: Path, base: BaseRecord) -> None:
    """Keeps `base` in `folder`.

    Raises:
        CheckpointError: the storage refuses.
    """
    replace_file(folder / BASE_NAME, json.dumps(base.as_json(), indent=1).encode())
