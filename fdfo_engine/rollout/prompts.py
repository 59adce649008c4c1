"""The prompt list of a run, and which prompt each global pair takes."""

import hashlib
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fdfo_engine.config import PromptsConfig
from fdfo_engine.ops import PROMPT_ORDER_STREAM, philox_words
from fdfo_engine.rollout.prompt_files import PLAIN_TEXT, Entry, Format, format_of
from fdfo_engine.rollout.prompt_sets import PROMPT_SETS, STARTER, local_files, named_set, starter_file
from fdfo_engine.rollout.texts import Texts, order_of, repeated
from fdfo_engine.runtime.errors import PromptError, UsageError
from fdfo_engine.shapes.scene import Split, captions

MAX_PROMPT_BYTES = 16 * 1024
_COMMENT = "#"
_WORDS_AT_ONCE = 1 << 18
_UNSEEN = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode categories of characters that show nothing: control and format characters, separators."""


@dataclass
class Reading:
    """What became of the lines and rows of a source on their way to prompts."""

    entries: int = 0
    """All lines or rows."""

    left_out: Counter[str] = field(default_factory=Counter)
    """How many are no prompts, by reason."""

    trimmed: int = 0
    """Prompts that had white space around them, which is dropped."""

    hashes: int = 0
    """Prompts from lines of text that begin with #."""

    def notes(self) -> list[str]:
        """What there is to tell, a sentence each."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()) if count)
        notes = [f"left out: {reasons}"] if reasons else []
        if self.trimmed:
            notes.append(f"white space around {self.trimmed} of them dropped")
        if self.hashes:
            notes.append(f"{self.hashes} begin with {_COMMENT}; prompts.comments=true leaves such lines out")
        return notes


class PromptList:
    """N prompts, and a fresh permutation of them for each pass, keyed by (seed, pass).

    Attributes:
        prompts: in the source's order; few bytes of memory each, however many there are.
        reading: what was left out of the source, or changed.
    """

    def __init__(
        self, prompts: Sequence[str], seed: int, reading: Reading | None = None, *, pairs_per_prompt: int = 1
    ) -> None:
        """`pairs_per_prompt` neighbouring pairs take the same prompt."""
        self._pairs_per_prompt = pairs_per_prompt
        self.prompts = prompts if isinstance(prompts, Texts) else Texts(prompts)
        self.reading = reading or Reading()
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Hash of the list as a JSON text, in order: what a resume compares. That text is never whole in memory."""
        digest = hashlib.sha256(b"[")
        for number, prompt in enumerate(self.prompts):
            digest.update((", " if number else "").encode() + json.dumps(prompt).encode())
        digest.update(b"]")
        return digest.hexdigest()

    def of_pairs(self, pair_ids: Sequence[int]) -> list[str]:
        """The prompt of each global pair p: `order[p mod N]` of pass `p // N`, a group of pairs counted as one."""
        n = len(self.prompts)
        groups = [pair // self._pairs_per_prompt for pair in pair_ids]
        return [self.prompts[int(self._order(p // n)[p % n])] for p in groups]

    def _permutation(self, number: int) -> npt.NDArray[np.uint32]:
        """The order of pass `number`. Words are drawn a part at a time: what they are made from takes far more room."""
        count = len(self.prompts)
        parts = (torch.arange(first, min(first + _WORDS_AT_ONCE, count)) for first in range(0, count, _WORDS_AT_ONCE))
        words = (philox_words(part, PROMPT_ORDER_STREAM, number, seed=self._seed).numpy() for part in parts)
        return order_of(words, count)[0]


def load_prompts(
    settings: PromptsConfig, seed: int, *, split: Split = "train", pairs_per_prompt: int = 1
) -> PromptList:
    """Reads `prompts.source`: a file, a prompt set by its name or from the hub, or the shapes generator.

    `split` chooses between two lists where there are two: of the shapes generator and of the set `starter`.

    A prompt is the text that stands in the file, without white space around it. Lines and rows without a visible
    character, or with null, are no prompts and are counted, as are comments if `prompts.comments` says that there are.

    Raises:
        PromptError: the file is missing or not of its format, holds no usable prompt, an oversized line, a row that
            does not fit its header, or not the column; or the set is not on this machine and `prompts.allow_download`
            is not set.
        EnvironmentProblem: a .parquet file without pyarrow.
    """
    if settings.source == "shapes":
        return PromptList(captions(split, settings.count, seed), seed, pairs_per_prompt=pairs_per_prompt)
    reading = Reading()
    prompts = _read(settings, reading, split)
    if settings.dedup:
        is_repeated = repeated(prompts)
        prompts = Texts(itertools.compress(prompts, ~is_repeated))
        reading.left_out["repeated"] = int(is_repeated.sum())
    return PromptList(prompts, seed, reading, pairs_per_prompt=pairs_per_prompt)


def describe_prompts(prompts: PromptList, pairs_per_epoch: int = 0) -> str:
    """One line on how many prompts there are, what was left out, and how often they repeat."""
    notes = prompts.reading.notes()
    if again := int(repeated(prompts.prompts).sum()):
        notes.append(f"{again} duplicates kept as weights; prompts.dedup=true drops them")
    line = f"{len(prompts)} prompts"
    if notes:
        line += f" ({'; '.join(notes)})"
    if len(prompts) < pairs_per_epoch:
        line += f", each used about {pairs_per_epoch / len(prompts):.1f} times an epoch"
    return line


def refuse_text(prompts: Sequence[str]) -> None:
    """Raises UsageError for one text where a list of them is meant: its letters would pass for prompts."""
    if isinstance(prompts, str):
        raise UsageError(f"prompts: the text {prompts!r}; takes a list of texts")


def _read(settings: PromptsConfig, reading: Reading, split: Split) -> Texts:
    files, column = _files_and_column(settings, split)
    prompts = Texts(prompt for path in files for prompt in _of_file(path, column, reading, settings))
    if not prompts:
        amount = "".join([f"{reading.entries} {format_of(files[0]).unit}", *(f" ({note})" for note in reading.notes())])
        raise PromptError(f"prompts.source = {settings.source!r}: 0 usable prompts in {amount}")
    return prompts


def _of_file(path: Path, column: str, reading: Reading, settings: PromptsConfig) -> Iterator[str]:
    form = format_of(path)
    has_comments = settings.comments and form is PLAIN_TEXT
    return _usable(form.read(path, column), reading, form, has_comments=has_comments)


def _files_and_column(settings: PromptsConfig, split: Split) -> tuple[list[Path], str]:
    if settings.source == STARTER and not Path(STARTER).exists():
        return [starter_file(split)], settings.column
    known = named_set(settings.source, settings.column)
    if known is not None:
        return local_files(known, allow_download=settings.allow_download), known.column
    path = Path(settings.source).expanduser()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise PromptError(
            f"prompts.source = {settings.source!r}: {what} ({path.resolve()}; working folder {Path.cwd()}). "
            f"Sets by name: {', '.join([STARTER, *PROMPT_SETS])}"
        )
    return [path], settings.column


def _usable(entries: Iterable[Entry], reading: Reading, form: Format, *, has_comments: bool) -> Iterator[str]:
    for where, text in entries:
        reading.entries += 1
        _refuse_nul(where, text or "")
        if text is None:
            reading.left_out["null"] += 1
        elif not _is_visible(text):
            reading.left_out["blank"] += 1
        elif has_comments and text.lstrip().startswith(_COMMENT):
            reading.left_out["comments"] += 1
        else:
            prompt = text.strip()
            _check(where, prompt, "line" if form is PLAIN_TEXT else "text")
            reading.trimmed += prompt != text
            reading.hashes += form is PLAIN_TEXT and prompt.startswith(_COMMENT)
            yield prompt


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character) not in _UNSEEN for character in text)


def _refuse_nul(where: str, text: str) -> None:
    if "\0" in text:
        raise PromptError(f"{where}: holds a NUL character, as no text does; is the file UTF-16? save it as UTF-8")


def _check(where: str, prompt: str, noun: str) -> None:
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise PromptError(f"{where}: holds half of a character, \\u{ord(prompt[error.start]):04x}") from error
    if size > MAX_PROMPT_BYTES:
        raise PromptError(f"{where}: a {noun} of {size} bytes; a prompt takes at most {MAX_PROMPT_BYTES}")
