"""Reads the data, in whichever form, as conversations or as ChatML made from a manifest.

In: a file (JSON, JSON lines, a table, Parquet) or a folder (folders). Out: raw entries, one for each row, in order; a
row that cannot be read is a `Reject` in its place. Rows with `messages` or `conversations` stay as they are, unless
--prompt_layout names a layout for them; rows that name audio are a manifest, which `manifest` turns into ChatML.
Guarantees: every row gives one entry or one reject (tests/test_bad_input.py, tests/test_manifest.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.input import arrow
from higgs_tune.preprocess.input.audio_paths import AudioPaths, looks_like_audio
from higgs_tune.preprocess.input.columns import SYNONYMS, has_audio
from higgs_tune.preprocess.input.conversations import is_conversation
from higgs_tune.preprocess.input.folders import list_in, read_folder
from higgs_tune.preprocess.input.json_rows import EXPECTED, read_json
from higgs_tune.preprocess.input.manifest import to_chatml
from higgs_tune.preprocess.input.relayout import in_layout
from higgs_tune.preprocess.input.rows import find_clip, manifest_rows
from higgs_tune.preprocess.input.tables import SUFFIXES, read_table, separator_of
from higgs_tune.preprocess.input.text_file import NO_TEXT, open_text
from higgs_tune.shards.errors import UserError, few

PEEKED = 100  # rows that tell what the others are
TABLE_HINT = (
    "The first line of a table names its columns, as in audio|text|speaker, with a tab, |, ; or comma between them. "
    "Kaldi's text is read with its folder, which holds wav.scp too."
)


def read_entries(job: Job) -> Iterator[Any]:
    """The entries of the data.

    Raises:
        UserError: the data cannot be read, or its form is not known.
    """
    rows = _rows(job.data, job.audio_paths)
    first = list(itertools.islice(rows, PEEKED))
    objects = [row for row in first if isinstance(row, dict)]
    rows = itertools.chain(first, rows)
    if any(map(is_conversation, objects)) or not objects:
        return in_layout(rows, job.config.prompt_layout) if job.config.prompt_layout else rows
    if job.data.is_dir() or job.data.suffix.lower() in SUFFIXES or any(map(_is_manifest, objects)):
        return to_chatml(manifest_rows(rows, job), job)
    got = f"objects with {few(sorted(map(str, objects[0])), 8)}"
    raise UserError(NO_TEXT, where=job.data, expected=EXPECTED, got=got)


def _is_manifest(row: dict[str, Any]) -> bool:
    return has_audio(map(str, row)) or any(name in row for name in ("text", "speaker", *SYNONYMS["text"]))


def _rows(data: Path, paths: AudioPaths) -> Iterator[Any]:
    """The rows of a file or folder as they stand there."""
    path = data
    if data.is_dir():
        metadata = list_in(data)
        if metadata is None:
            yield from read_folder(data)
            return
        path = metadata
    if path.suffix.lower() == ".parquet":
        yield from arrow.read_parquet([path], path.parent)
        return
    try:
        yield from _text_rows(path, paths)
    except OSError as error:
        raise UserError(f"cannot read the data: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the data: {error}", where=path) from error


def _text_rows(path: Path, paths: AudioPaths) -> Iterator[Any]:
    def is_audio(cell: str) -> bool:
        return looks_like_audio(cell) or find_clip(cell, paths) is not None

    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith(("[", "{")):
            yield from read_json(file, first, path)
            return
        layout = separator_of(first.rstrip("\r\n"), path.suffix.lower(), is_audio)
        if layout is None:
            got = "".join(c for c in first[:40].strip() if c.isprintable()) or "nothing"
            raise UserError(NO_TEXT, where=path, expected=EXPECTED, got=got, hint=TABLE_HINT)
        yield from read_table(file, path, layout[0], header=layout[1], is_audio=is_audio)
