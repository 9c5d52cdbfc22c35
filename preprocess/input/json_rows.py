"""Reads JSON: an array, one object a line, or one object that holds the rows in the way of another tool.

In: a text file that begins with `[` or `{`. Out: rows; a line that is not JSON becomes a reject. An object may hold
one list of rows (`{"samples": [...]}`), a list for each column, or an object or text for each audio file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from higgs_tune.preprocess.input.audio_paths import looks_like_audio
from higgs_tune.preprocess.input.columns import has_audio
from higgs_tune.preprocess.input.conversations import is_conversation
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError

EXPECTED = "ChatML (a JSON array, or one object a line), or a manifest with audio, text and speaker"


def read_json(file: IO[str], first: str, path: Path) -> Iterator[Any]:
    """The rows of a file; `first`: its first line that is not empty, still to be read again from `file`.

    Raises:
        UserError: it is not JSON, or an object that holds no rows in a known way.
    """
    if first.lstrip().startswith("["):
        yield from _parse(file.read(), path)
        return
    lines = list(itertools.islice((line for line in file if line.strip()), 2))
    file.seek(0)
    one = _object(lines[0])
    if len(lines) == 1 and one is not None:
        yield from [one] if _is_row(one) else _rows_within(_parse(lines[0], path), path)
    elif one is not None or lines[1].lstrip().startswith("{"):
        yield from _read_lines(file)
    else:
        whole = _parse(file.read(), path)
        if _is_row(whole):
            hint = "Put the objects into a list: [{…}, {…}], or each on one line: jq -c . FILE > NEW.jsonl"
            raise UserError("a JSON object over several lines", where=path, expected=EXPECTED, hint=hint)
        yield from _rows_within(whole, path)


def _read_lines(lines: Iterator[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Reject("invalid_json", f"line {number}: {error}")


def _object(line: str) -> dict[str, Any] | None:
    """The object on one line; None where it is not whole."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=None if text.lstrip().startswith("[") else _without_repeats)
    except (ValueError, RecursionError) as error:
        several = "Extra data" in str(error)
        hint = "Are these several objects? jq -c . FILE > NEW.jsonl puts each on one line." if several else ""
        raise UserError(f"the data is not JSON: {error}", where=path, hint=hint) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a name stands twice in one object: {next(n for n in names if names.count(n) > 1)!r:.80}")
    return made


def _is_row(value: Any) -> bool:
    """Whether an object is one sample: a conversation, or texts under the names of a manifest's columns."""
    audios = [cell for name, cell in value.items() if has_audio([name])] if isinstance(value, dict) else []
    return is_conversation(value) or any(isinstance(cell, str) for cell in audios)


def _rows_within(whole: dict[str, Any], path: Path) -> list[Any]:
    """The rows that one object holds.

    Raises:
        UserError: it holds several lists of rows, or none in a known way.
    """
    lists = {name: value for name, value in whole.items() if _is_list_of_objects(value)}
    if "segments" in lists and not any(map(is_conversation, lists["segments"])) and not has_audio(lists["segments"][0]):
        hint = "Write one row a segment, with the columns audio, offset, duration (in seconds), text and speaker."
        raise UserError("a transcript of one recording, as Whisper writes it, not a list", where=path, hint=hint)
    if len(lists) > 1:
        hint = f"Take one of them out: jq .{next(iter(lists))} FILE > NEW.json"
        raise UserError("the object holds several lists", where=path, got=", ".join(lists), hint=hint)
    if lists:
        return next(iter(lists.values()))
    if has_audio(whole) and (rows := _columns(whole)):
        return rows
    if whole and all(map(looks_like_audio, whole)) and all(isinstance(value, str | dict) for value in whole.values()):
        return [{"audio": file} | (row if isinstance(row, dict) else {"text": row}) for file, row in whole.items()]
    if whole and all(isinstance(value, dict) and has_audio(value) for value in whole.values()):
        return [{"id": name} | value for name, value in whole.items()]
    got = ", ".join(list(whole)[:8])
    raise UserError("a JSON object that holds no rows in a known way", where=path, expected=EXPECTED, got=got)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _columns(whole: dict[str, Any]) -> list[Any]:
    """Rows out of columns: lists of one length, or pandas' objects with the same row numbers; else none."""
    columns = {name: list(value.values()) if isinstance(value, dict) else value for name, value in whole.items()}
    names = {tuple(value) for value in whole.values() if isinstance(value, dict)}
    lengths = {len(value) if isinstance(value, list) else -1 for value in columns.values()}
    if len(lengths) != 1 or -1 in lengths or len(names) > 1:
        return []
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
