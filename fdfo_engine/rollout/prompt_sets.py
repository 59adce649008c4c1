"""Well-known prompt sets by name, any dataset of the hub, and the file formats that they come in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.errors import EnvironmentProblem, PromptError

HUB = "hub:"
_HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
_ANY_TABLE = ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet")


@dataclass(frozen=True)
class PromptSet:
    """A dataset of the hub: which of its files hold prompts (patterns of `fnmatch`), and in which column."""

    repo: str
    files: tuple[str, ...]
    column: str = "prompt"


PROMPT_SETS = {
    "pickscore": PromptSet("yuvalkirstain/pickapic_v2_no_images", ("data/test-*.parquet",), "caption"),
    "hpdv2": PromptSet("zhwang/HPDv2", tuple(f"benchmark/{style}.json" for style in _HPD_STYLES)),
    "parti": PromptSet("nateraw/parti-prompts", ("PartiPrompts.tsv",), "Prompt"),
    "drawbench": PromptSet("sayakpaul/drawbench", _ANY_TABLE, "Prompts"),
}  # fmt: skip
"""By the name that `prompts.source` and `--prompts` take."""

_ELSEWHERE = {
    "geneval": "its prompts are prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval; name that file"
}


def named_set(source: str, column: str) -> PromptSet | None:
    """The set that `source` names, or None where it is a path.

    Raises:
        PromptError: a set that is not on the hub; says where it is. A `hub:` that names no dataset.
    """
    if source in _ELSEWHERE and not Path(source).exists():
        raise PromptError(f"prompts.source = {source!r}: {_ELSEWHERE[source]}")
    if source.startswith(HUB):
        owner, _, rest = source.removeprefix(HUB).partition("/")
        name, _, pattern = rest.partition("/")
        if not owner or not name:
            raise PromptError(f"prompts.source = {source!r}: takes hub:OWNER/NAME or hub:OWNER/NAME/FILE")
        return PromptSet(f"{owner}/{name}", (pattern,) if pattern else _ANY_TABLE, column)
    return None if Path(source).exists() else PROMPT_SETS.get(source)


def local_files(found: PromptSet, *, allow_download: bool) -> list[Path]:
    """The set's files on this machine, fetched from the hub if `allow_download`; nothing else is fetched.

    Raises:
        PromptError: they are not here and may not be fetched, or the hub does not give them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    what = f"{', '.join(found.files)} of the dataset {found.repo} from huggingface.co"
    try:
        folder = Path(
            snapshot_download(
                found.repo, repo_type="dataset", allow_patterns=list(found.files), local_files_only=not allow_download
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if not allow_download:
            raise PromptError(_would_fetch(what)) from error
        raise PromptError(f"could not fetch {what}: {str(error).splitlines()[0]}") from error
    files = sorted({path for pattern in found.files for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise PromptError(
            f"the dataset {found.repo} has no {', '.join(found.files)}" if allow_download else _would_fetch(what)
        )
    return files


def read_table(path: Path, column: str) -> list[str]:
    """The texts of `column` in a .json (a list of texts or of objects), .csv, .tsv or .parquet file, as they stand.

    Raises:
        PromptError: not of that format, or without the column; lists those present.
        EnvironmentProblem: a .parquet file without pyarrow.
    """
    rows = READERS[path.suffix](path)
    texts = []
    for number, row in enumerate(rows, 1):
        text = row if isinstance(row, str) else row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            present = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise PromptError(f"{path}, row {number}: no text under prompts.column = {column!r}; it has {present}")
        texts.append(text)
    return texts


def _would_fetch(what: str) -> str:
    return (
        f"prompts.source: this would fetch {what}; nothing is fetched unasked: "
        "allow it with prompts.allow_download=true (--allow-download), or name a local file"
    )


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise PromptError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise PromptError(f"{path}: a {type(rows).__name__}; takes a list of texts or of objects")
    return rows


def _read_separated(path: Path, separator: str) -> Iterable[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, delimiter=separator))
    except (csv.Error, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: {error}") from error


def _read_parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise EnvironmentProblem(f'{path}: {error}; pip install "fdfo-engine[parquet]"') from error
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise PromptError(f"{path}: {str(error).splitlines()[0]}") from error
    return rows


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".json": _read_json,
    ".csv": lambda path: _read_separated(path, ","),
    ".tsv": lambda path: _read_separated(path, "\t"),
    ".parquet": _read_parquet,
}
"""Of the formats that are not read line by line, by suffix."""
