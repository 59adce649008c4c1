"""The prompt list of a run, and which prompt each global pair takes."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from fdfo_engine.config import PromptsConfig
from fdfo_engine.ops import PROMPT_ORDER_STREAM, philox_words
from fdfo_engine.rollout.prompt_sets import READERS, local_files, named_set, read_table
from fdfo_engine.runtime.errors import PromptError, UsageError
from fdfo_engine.shapes.scene import Split, captions

MAX_PROMPT_BYTES = 16 * 1024


class PromptList:
    """N prompts, and a fresh permutation of them for each pass, keyed by (seed, pass)."""

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        self.prompts = list(prompts)
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Hash of the list, in order: what a resume compares."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()

    def of_pairs(self, pair_ids: Sequence[int]) -> list[str]:
        """The prompt of each global pair: `order[p mod N]` of pass `p // N`."""
        n = len(self.prompts)
        return [self.prompts[self._order(p // n)[p % n]] for p in pair_ids]

    def _permutation(self, number: int) -> list[int]:
        words = philox_words(torch.arange(len(self.prompts)), PROMPT_ORDER_STREAM, number, seed=self._seed)
        return words.argsort(stable=True).tolist()


def load_prompts(settings: PromptsConfig, seed: int, *, split: Split = "train") -> PromptList:
    """Reads `prompts.source`: a file, a prompt set by its name or from the hub, or the shapes generator (its `split`).

    Raises:
        PromptError: the file is missing, holds no usable prompt, an oversized line or not the column; or the set is not
            on this machine and `prompts.allow_download` is not set.
    """
    if settings.source == "shapes":
        return PromptList(captions(split, settings.count, seed), seed)
    known = named_set(settings.source, settings.column)
    if known is None:
        prompts = _read(Path(settings.source).expanduser(), settings.source, settings.column)
    else:
        files = local_files(known, allow_download=settings.allow_download)
        prompts = [prompt for file in files for prompt in _read(file, str(file), known.column)]
    return PromptList(list(dict.fromkeys(prompts)) if settings.dedup else prompts, seed)


def describe_prompts(prompts: PromptList, pairs_per_epoch: int) -> str:
    """One line on how many prompts there are and how often they repeat."""
    repeated = sum(count - 1 for count in Counter(prompts.prompts).values())
    line = f"{len(prompts)} prompts"
    if repeated:
        line += f" ({repeated} duplicates kept as weights; prompts.dedup=true drops them)"
    if len(prompts) < pairs_per_epoch:
        line += f", each used about {pairs_per_epoch / len(prompts):.1f} times an epoch"
    return line


def _read(path: Path, source: str, column: str) -> list[str]:
    if not path.is_file():
        raise PromptError(f"prompts.source = {source!r}: no such file ({path.resolve()}; working folder {Path.cwd()})")
    if path.suffix in READERS:
        rows = read_table(path, column)
        for number, row in enumerate(rows, 1):
            _check_length(path, number, row)
        prompts, unit = [row.strip() for row in rows if row.strip()], "rows"
    else:
        rows, unit = _lines(path), "lines"
        prompts = (_read_jsonl if path.suffix == ".jsonl" else _read_text)(path, rows, column)
    if not prompts:
        raise PromptError(f"prompts.source = {source!r}: 0 usable prompts in {len(rows)} {unit}")
    return prompts


def _lines(path: Path) -> list[str]:
    """Lines end at line ends only: `splitlines` would also cut a caption at U+2028 or a form feed."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    return text.removesuffix("\n").split("\n") if text else []


def _read_text(path: Path, lines: Sequence[str], column: str) -> list[str]:
    del column  # a text file has one
    for number, line in enumerate(lines, 1):
        _check_length(path, number, line)
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _read_jsonl(path: Path, lines: Sequence[str], column: str) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        _check_length(path, number, line)
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            present = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise PromptError(f"{path}:{number}: no text under prompts.column = {column!r}; it has {present}")
        if row[column].strip():
            prompts.append(row[column].strip())
    return prompts


def _check_length(path: Path, number: int, line: str) -> None:
    size = len(line.encode())
    if size > MAX_PROMPT_BYTES:
        raise PromptError(f"{path}:{number}: a line of {size} bytes; a prompt takes at most {MAX_PROMPT_BYTES}")


def refuse_text(prompts: Sequence[str]) -> None:
    """Raises UsageError for one text where a list of them is meant: its letters would pass for prompts."""
    if isinstance(prompts, str):
        raise UsageError(f"prompts: the text {prompts!r}; takes a list of texts")
