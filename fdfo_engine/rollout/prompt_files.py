"""Files of prompts, a format at a time: what stands in each line or row, unchanged."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fdfo_engine.runtime.errors import EnvironmentProblem, PromptError
from fdfo_engine.runtime.text_file import lines_in, read_text, whole_lines

_MAX_NAMES = 20  # of columns that a message lists
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


class Entry(NamedTuple):
    """One line or row."""

    where: str
    """File and number, as a message names it."""

    text: str | None
    """What stands there; None where the file says null."""


class Format(NamedTuple):
    """A file format: how its entries are read, given the column of the prompt, and what they are called."""

    read: Callable[[Path, str], Iterator[Entry]]
    unit: str


def format_of(path: Path) -> Format:
    """The format that a file's ending names, in capitals or not; lines of text where it names none.

    Raises:
        PromptError: the ending is that of a compressed file.
    """
    ending = path.suffix.lower()
    if ending in _COMPRESSED:
        raise PromptError(f"{path}: a compressed file; unpack it first")
    return _FORMATS.get(ending, PLAIN_TEXT)


def _read_plain_text(path: Path, column: str) -> Iterator[Entry]:
    del column  # a line of text is one prompt
    for number, line in enumerate(lines_in(path), 1):
        yield Entry(f"{path}:{number}", line)


def _read_jsonl(path: Path, column: str) -> Iterator[Entry]:
    return _rows_of_lines(path, column, lines_in(path))


def _rows_of_lines(path: Path, column: str, lines: Iterable[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        yield Entry(where, _text_in(_parsed(line, where, column), where, column) if line.strip() else "")


def _read_json(path: Path, column: str) -> Iterator[Entry]:
    """One list of rows; or an object a line, for many files of that form are named .json."""
    start = list(itertools.islice(lines_in(path), 2))
    if len(start) == 2 and start[0].lstrip().startswith("{") and start[0].rstrip().endswith("}"):
        yield from _rows_of_lines(path, column, lines_in(path))
        return
    rows = _parsed(read_text(path), str(path), column)
    if not isinstance(rows, list):
        raise PromptError(f"{path}: a {type(rows).__name__}; takes a list of texts or of objects")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield Entry(where, _text_in(row, where, column))


def _parsed(text: str, where: str, column: str) -> Any:
    """The JSON value of a text. An object in which the column stands twice is refused: either could be meant."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if Counter(key for key, _ in pairs)[column] > 1:
            raise PromptError(f"{where}: an object has the key {column!r} twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:  # no JSON; a number of too many digits; too deep a nesting
        raise PromptError(f"{where}: not JSON: {error}") from error


def _text_in(row: Any, where: str, column: str) -> str | None:
    if row is None or isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise PromptError(f"{where}: no text under prompts.column = {column!r}; it is of type {type(row).__name__}")
    if column not in row:
        raise _no_column(where, column, row)
    value = row[column]
    if value is None or isinstance(value, str):
        return value
    raise PromptError(f"{where}: no text under prompts.column = {column!r}; what stands there is {value!r:.80}")


def _no_column(where: str, column: str, names: Iterable[str]) -> PromptError:
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return PromptError(f"{where}: no text under prompts.column = {column!r}; it has {listed[:_MAX_NAMES]}{more}")


class _Cells(NamedTuple):
    """A row of a table, and the line of the file that it begins in."""

    line: int
    cells: list[str]


def _read_csv(path: Path, column: str) -> Iterator[Entry]:
    return _column_of(path, column, _csv_rows(path), "a cell with a comma in it is put in double quotes")


def _read_tsv(path: Path, column: str) -> Iterator[Entry]:
    """Tabs part the cells and line ends the rows. There is no quoting: a quote is a character as others are."""
    lines = enumerate(lines_in(path), 1)
    rows = (_Cells(number, line.split("\t")) for number, line in lines)
    return _column_of(path, column, rows, "cells of .tsv files hold neither tabs nor line ends, and have no quoting")


def _csv_rows(path: Path) -> Iterator[_Cells]:
    # of the whole process, and never lowered: another column may hold whole images
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
    reader = csv.reader(whole_lines(path), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "inside a quoted cell a quote is written twice"
            raise PromptError(f"{path}:{line}: the row that begins here is no CSV: {error}; {hint}") from error
        yield _Cells(line, cells)


def _column_of(path: Path, column: str, rows: Iterator[_Cells], hint: str) -> Iterator[Entry]:
    """The cells under the header `column`; every row has as many cells as the header, or is blank."""
    header = next((row.cells for row in rows if _has_text(row)), None)
    if header is None:
        return
    index = _index_of(column, header, f"{path}, row 1")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number} (line {row.line})"
        if not _has_text(row):
            yield Entry(where, "")
        elif len(row.cells) != len(header):
            raise PromptError(f"{where}: {len(row.cells)} cells, and the header has {len(header)}; {hint}")
        else:
            yield Entry(where, row.cells[index])


def _has_text(row: _Cells) -> bool:
    return any(cell.strip() for cell in row.cells)


def _index_of(column: str, names: list[str], where: str) -> int:
    if column not in names:
        raise _no_column(where, column, names)
    if names.count(column) > 1:
        raise PromptError(f"{where}: prompts.column = {column!r}: the header has it {names.count(column)} times")
    return names.index(column)


def _read_parquet(path: Path, column: str) -> Iterator[Entry]:
    """Reads that column only, batch by batch: images beside it stay on disk."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise EnvironmentProblem(f'{path}: {error}; pip install "fdfo-engine[parquet]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            kind = schema.field(_index_of(column, schema.names, f"{path}, row 1")).type
            if not _holds_text(kind):
                raise PromptError(f"{path}: no text under prompts.column = {column!r}; it is of type {kind}")
            batches = file.iter_batches(columns=[column])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(texts, 1):
                yield Entry(f"{path}, row {number}", text)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: {str(error).splitlines()[0]}") from error


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(test(values) for test in tests)


PLAIN_TEXT = Format(_read_plain_text, "lines")

_FORMATS = {
    ".jsonl": Format(_read_jsonl, "lines"),
    ".ndjson": Format(_read_jsonl, "lines"),
    ".jsonlines": Format(_read_jsonl, "lines"),
    ".json": Format(_read_json, "rows"),
    ".csv": Format(_read_csv, "rows"),
    ".tsv": Format(_read_tsv, "rows"),
    ".parquet": Format(_read_parquet, "rows"),
}
"""By the file's ending."""
