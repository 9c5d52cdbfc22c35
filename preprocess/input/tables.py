"""Reads a table: its first line tells the separator and the columns; a row that cannot be read becomes a reject.

In: the lines of a file with a tab, `|`, semicolon or comma between cells. Out: rows as dicts. In comma and semicolon
files quotes enclose cells (RFC 4180); in tab and `|` files they are text.
Guarantees: no row is swallowed by a quote (tests/test_tables.py).
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.input.audio_paths import looks_like_audio
from higgs_tune.preprocess.input.columns import has_audio, nameless_columns
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError

SEPARATORS = "\t|;,"  # a line with one of them may hold the later ones in its texts
QUOTED = ";,"  # separators of files whose quotes enclose cells
SUFFIXES = {".csv": ",", ".tsv": "\t"}
LINE_ENDS = "\r\n"


@dataclass(frozen=True)
class Record:
    """One row: its cells or a reject, and the lines that it spans, from 1."""

    first: int
    last: int
    cells: list[str]
    reject: Reject | None = None

    @property
    def place(self) -> str:
        return f"line {self.first}" if self.first == self.last else f"lines {self.first} to {self.last}"


def separator_of(line: str, suffix: str, is_audio: Callable[[str], bool]) -> tuple[str, bool] | None:
    """(separator, whether this first line is a header); None where this is no table.

    Args:
        is_audio: whether a cell names an audio file; tells a row from a header.
    """
    split = {separator: _cells(line, separator) for separator in SEPARATORS if separator in line}
    for separator, cells in split.items():
        if has_audio(cells) and not any(map(looks_like_audio, cells)):
            return separator, True
    for separator, cells in split.items():
        if cells and is_audio(cells[0]):
            return separator, False
    if suffix not in SUFFIXES:
        return None
    return (SUFFIXES[suffix] if not split or SUFFIXES[suffix] in split else next(iter(split))), True


def _cells(line: str, separator: str) -> list[str]:
    if separator not in QUOTED:
        return [cell.strip() for cell in line.split(separator)]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    except csv.Error:
        return []


def read_table(
    lines: Iterable[str], path: Path, separator: str, *, header: bool, is_audio: Callable[[str], bool]
) -> Iterator[Any]:
    """The rows as dicts under the table's own names, rejects in their places.

    Raises:
        UserError: the header cannot be read or repeats a name; there is none, and the contents do not tell the columns;
            a quoted cell holds a line break and a separator, or swallows lines without an end.
    """
    records = _records(lines, path, separator)
    if header:
        names = _header(next(records, None), path)
    else:
        rows = list(records)
        width = Counter(len(row.cells) for row in rows if row.cells).most_common(1)[0][0]
        names = nameless_columns([row.cells for row in rows if len(row.cells) == width], is_audio, path)
        records = iter(rows)
    for record in records:
        if record.reject:
            yield record.reject
        elif len(record.cells) == len(names):
            yield dict(zip(names, record.cells, strict=True))
        else:
            detail = f"{record.place}: expected {len(names)} fields, got {len(record.cells)}"
            yield Reject("malformed_manifest", detail)


def _header(record: Record | None, path: Path) -> list[str]:
    if record is None or record.reject:
        detail = record.reject.detail.partition(": ")[2] if record and record.reject else "there is no row"
        raise UserError(f"cannot read the names of the table's columns: {detail}", where=path)
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(record.cells, 1)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError("several columns of the table have the same name", where=path, got=repeated)
    return names


def _records(lines: Iterable[str], path: Path, separator: str) -> Iterator[Record]:
    if separator in QUOTED:
        yield from _quoted_records(lines, path, separator)
        return
    for number, line in enumerate(lines, 1):
        if line.strip(LINE_ENDS):
            yield Record(number, number, line.strip(LINE_ENDS).split(separator))


def _quoted_records(lines: Iterable[str], path: Path, separator: str) -> Iterator[Record]:
    """Rows of a file whose cells may stand in quotes, each on one line or several.

    Raises:
        UserError: a cell swallows the rows after it.
    """
    lines = iter(lines)
    head = next(lines, "")
    spaced = f"{separator} " in head  # as in `audio, text`: a space is part of the separator
    reader = csv.reader(_after(head, lines), delimiter=separator, strict=True, skipinitialspace=spaced)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if reader.line_num > first:  # whole rows are inside this one, and no reject would name them
                what = f"cannot read the row that begins here and ends on line {reader.line_num}: {error}"
                hint = "Is a quoted cell not closed?"
                raise UserError(what, where=f"{path}, line {first}", hint=hint) from error
            yield Record(first, first, [], Reject("malformed_manifest", f"line {first}: {error}"))
            continue
        if cells is None:
            return
        if any(separator in cell and ("\n" in cell or "\r" in cell) for cell in cells):
            what = "a quoted cell holds a line break and a separator, so it may swallow rows"
            hint = "Close or double its quote; write texts of several lines as JSON lines."
            raise UserError(what, where=f"{path}, lines {first} to {reader.line_num}", hint=hint)
        if cells:
            yield Record(first, reader.line_num, cells)


def _after(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines
