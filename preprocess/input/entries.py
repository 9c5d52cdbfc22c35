"""Reads ChatML, a manifest or a datasets folder as ChatML entries.

In: a JSON array, JSONL, CSV or TSV file, or a folder written by `datasets`' `save_to_disk`. Out: raw ChatML entries,
one for each row, in order; a row that cannot be read is a `Reject` in its place. Rows with `messages` are ChatML; rows
with `audio` and `text` are a manifest, which `manifest` turns into ChatML.
Guarantees: every row gives one entry or one reject (tests/test_bad_input.py, tests/test_manifest.py).
"""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.input import arrow
from higgs_tune.preprocess.input.manifest import to_chatml
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError

CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}
NEEDED = {"audio", "text", "speaker"}  # columns of a manifest
EXPECTED = "ChatML (a JSON array, or one object a line), or a manifest with audio, text and speaker"


def read_entries(job: Job) -> Iterator[Any]:
    """The entries of the data.

    Raises:
        UserError: the data cannot be read, or its form is not known.
    """
    rows = arrow.read_rows(job.data) if job.data.is_dir() else _file_rows(job.data)
    seen: list[Any] = []
    first: dict[str, Any] | None = None
    for row in rows:  # the first row that can be read says what the others are
        seen.append(row)
        if isinstance(row, dict):
            first = row
            break
    rows = itertools.chain(seen, rows)
    table = job.data.is_dir() or job.data.suffix.lower() in CSV_SUFFIXES
    if first is None or "messages" in first or not (table or first.keys() & NEEDED):
        return rows
    missing = NEEDED - first.keys()
    if missing:
        raise UserError("the manifest lacks columns", where=job.data, expected=sorted(missing), got=sorted(first))
    return to_chatml(list(rows), job)


def _file_rows(path: Path) -> Iterator[Any]:
    try:
        # undecodable bytes become lone surrogates here, and a named reject where their row is looked at
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                yield from _read_array(file.read(), path)
            elif first.strip() == "{":
                raise UserError("a JSON object over several lines", where=path, expected=EXPECTED)
            elif first.lstrip().startswith("{"):
                yield from _read_lines(file)
            elif path.suffix.lower() in CSV_SUFFIXES:
                yield from _read_table(file, path)
            else:
                got = first[:40].strip() or "nothing"
                raise UserError("not a ChatML file or manifest", where=path, expected=EXPECTED, got=got)
    except OSError as error:
        raise UserError(f"cannot read the data: {error.strerror}", where=path) from error


def _read_array(text: str, path: Path) -> list[Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the data is not JSON: {error}", where=path) from error


def _read_lines(lines: Iterator[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Reject("invalid_json", f"line {number}: {error}")


def _read_table(lines: Iterator[str], path: Path) -> Iterator[Any]:
    reader = csv.reader(lines, delimiter=CSV_SUFFIXES[path.suffix.lower()], strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"cannot read the names of the table's columns: {error}", where=path) from error
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise UserError("several columns of the table have the same name", where=path, got=repeated)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if reader.line_num > first:  # whole rows are inside this one, and no reject would name them
                what = f"cannot read the row that begins here and ends on line {reader.line_num}: {error}"
                hint = "Is a quoted cell not closed?"
                raise UserError(what, where=f"{path}, line {first}", hint=hint) from error
            yield Reject("malformed_manifest", f"line {first}: {error}")
            continue
        if fields is None:
            return
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif fields:
            place = f"line {first}" if reader.line_num == first else f"lines {first} to {reader.line_num}"
            yield Reject("malformed_manifest", f"{place}: expected {len(header)} fields, got {len(fields)}")
