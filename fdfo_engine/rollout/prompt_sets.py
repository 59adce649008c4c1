"""Well-known prompt sets by name, and any dataset of the hub: which files hold their prompts, and in which column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fdfo_engine.runtime.errors import PromptError
from fdfo_engine.runtime.hub import hub_errors, hub_reason, quiet_hub
from fdfo_engine.shapes.scene import Split

HUB = "hub:"
STARTER = "starter"
"""The set that comes with the engine: lines of our own to train on, and others that are held out."""
_HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
_WILDCARD = re.compile(r"[*?\[]")
_PART = re.compile(r"(.*)-\d+-of-(\d+)(\.[^/]*)")
_ANY_TABLE = ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.parquet")


@dataclass(frozen=True)
class PromptSet:
    """A dataset of the hub: which of its files hold prompts (patterns of `fnmatch`), and in which column."""

    repo: str
    files: tuple[str, ...]
    column: str = "prompt"

    def has(self, name: str) -> bool:
        """Whether the file of that path in the dataset is one of them."""
        return any(fnmatchcase(name, pattern) for pattern in self.files)


PROMPT_SETS = {
    "pickscore": PromptSet("yuvalkirstain/pickapic_v2_no_images", ("data/test-*.parquet",), "caption"),
    "hpdv2": PromptSet("zhwang/HPDv2", tuple(f"benchmark/{style}.json" for style in _HPD_STYLES)),
    "parti": PromptSet("nateraw/parti-prompts", ("PartiPrompts.tsv",), "Prompt"),
    "drawbench": PromptSet("sayakpaul/drawbench", _ANY_TABLE, "Prompts"),
}  # fmt: skip
"""By the name that `prompts.source` and `--prompts` take. Results are measured on all of them: none is for training."""

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


def starter_file(split: Split) -> Path:
    """The file of the set `STARTER` for training, or for evaluations."""
    return Path(__file__).parent / "starter" / f"{split}.txt"


def local_files(found: PromptSet, *, allow_download: bool) -> list[Path]:
    """The set's files on this machine, fetched from the hub if `allow_download`; nothing else is fetched.

    Raises:
        PromptError: they are not here and may not be fetched, or the hub does not give them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    what = f"{', '.join(found.files)} of the dataset {found.repo} from huggingface.co"
    patterns = list(found.files)
    try:
        with quiet_hub():
            folder = Path(
                snapshot_download(
                    found.repo, repo_type="dataset", allow_patterns=patterns, local_files_only=not allow_download
                )
            )
    except hub_errors(HFValidationError) as error:
        if not allow_download:
            raise PromptError(_would_fetch(what)) from error
        reason = hub_reason(found.repo, error, kind="dataset") or str(error).splitlines()[0]
        raise PromptError(f"could not fetch {what}: {reason}") from error
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if found.has(name)]
    if missing := _missing(found, names):
        raise PromptError(
            f"the dataset {found.repo} has no {', '.join(missing)}" if allow_download else _would_fetch(what)
        )
    return [folder / name for name in names]


def _missing(found: PromptSet, names: Sequence[str]) -> list[str]:
    """What is not among `names`: everything, a file named in full, or some of the numbered parts of a table.

    A fetch that was interrupted leaves a part of a set, which would otherwise pass for the whole.
    """
    if not names:
        return list(found.files)
    expected = {name for name in found.files if not _WILDCARD.search(name)}
    for before, count, after in {part.groups() for part in map(_PART.fullmatch, names) if part}:
        expected |= {f"{before}-{number:0{len(count)}}-of-{count}{after}" for number in range(int(count))}
    return sorted(name for name in expected - set(names) if found.has(name))


def _would_fetch(what: str) -> str:
    return (
        f"prompts.source: this would fetch {what}; nothing is fetched unasked: "
        "allow it with prompts.allow_download=true (--allow-download), or name a local file"
    )
