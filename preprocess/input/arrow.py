"""Columnar data: a Hugging Face `datasets` folder (`save_to_disk`) or Parquet files, and the audio bytes inside them.

In: a folder with `state.json` and Arrow stream files. Out: rows as dicts. An audio cell whose bytes the
Arrow file holds becomes the path `FILE.arrow#COLUMN:ROW`, so that workers read them in place. Files are memory-mapped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError

_CELL = re.compile(r"(?:(?<=\.arrow)|(?<=\.parquet))#([\w.-]+):(\d+)$")  # column and row
BATCH_ROWS = 64  # of Parquet files; audio bytes are among the columns


def arrow_cell(path: str) -> tuple[str, str, int] | None:
    """(file, column, row) of a path into an Arrow or Parquet file; None for other paths."""
    match = _CELL.search(path)
    return (path[: match.start()], match[1], int(match[2])) if match else None


def arrow_audio(file: Path, column: str, row: int, source: str) -> bytes:
    """The bytes of one audio cell.

    Raises:
        Reject: no such row or column, or no bytes in it.
    """
    try:
        cell = _cell(file, column, row)
    except (KeyError, IndexError, OSError, ValueError) as error:
        raise Reject("missing_audio", f"no such cell: {error}", source) from error
    if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
        raise Reject("missing_audio", "no bytes in this cell", source)
    return cell["bytes"]


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        hint = "Install it with: pip install higgs-tune[datasets]"
        raise UserError("reading Arrow and Parquet files needs pyarrow", hint=hint) from error
    return pyarrow


def _cell(file: Path, column: str, row: int) -> Any:
    if file.suffix == ".arrow":
        return _table(file, column)[row].as_py()
    for group, size in enumerate(_group_sizes(file)):
        if row < size:
            return _row_group(file, group, column)[row].as_py()
        row -= size
    raise IndexError(row)


@lru_cache(maxsize=64)
def _group_sizes(file: Path) -> list[int]:
    metadata = _parquet(file).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


@lru_cache(maxsize=2)
def _row_group(file: Path, group: int, column: str) -> Any:
    return _parquet(file).read_row_group(group, columns=[column]).column(column)


def _parquet(file: Path) -> Any:
    _pyarrow()
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file)


@lru_cache(maxsize=8)
def _table(file: Path, column: str) -> Any:
    """One column of an Arrow stream file, mapped."""
    arrow = _pyarrow()
    with arrow.memory_map(str(file)) as source, arrow.ipc.open_stream(source) as stream:
        return stream.read_all().column(column)


def data_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset folder, in order.

    Raises:
        UserError: not such a folder, or a `DatasetDict` of several splits.
    """
    state = folder / "state.json"
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        raise UserError("this folder holds several splits", where=folder, hint=f"Give one of: {', '.join(splits)}.")
    if not state.is_file():
        raise UserError("not a datasets folder", where=folder, expected="state.json, as save_to_disk writes it")
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the dataset's state: {error!r}", where=state) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError("files of the dataset are missing", where=folder, got=", ".join(missing))
    return [folder / name for name in names]


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder or its `data`, in order; none where there are none.

    Raises:
        UserError: they are of several splits, as the Hub names them (`train-00000-of-00001.parquet`).
    """
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    splits = sorted({re.split(r"-\d{5}-of-\d{5}", file.stem)[0] for file in files})
    if len(splits) > 1:
        hint = "Move those of one split to a folder of their own, or give a single file."
        raise UserError("Parquet files of several kinds", where=folder, got=", ".join(splits), hint=hint)
    return files


def read_parquet(files: list[Path], folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files as dicts; an audio cell becomes a path, relative to `folder`.

    Raises:
        UserError: pyarrow is not installed, or a file is damaged.
    """
    arrow = _pyarrow()
    for file in files:
        first = 0
        try:
            for part in _parquet(file).iter_batches(BATCH_ROWS):
                yield from _batch(part, str(file.relative_to(folder)), first)
                first += part.num_rows
        except (OSError, arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
            raise UserError(f"cannot read the Parquet file: {error}", where=file) from error


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows as dicts; an audio cell becomes a path.

    Raises:
        UserError: no such folder, pyarrow is not installed, or a file is damaged.
    """
    arrow = _pyarrow()
    for file in data_files(folder):
        first = 0
        try:
            with arrow.memory_map(str(file)) as source, arrow.ipc.open_stream(source) as stream:
                for part in stream:
                    yield from _batch(part, file.name, first)
                    first += part.num_rows
        except (OSError, arrow.ArrowInvalid) as error:
            raise UserError(f"cannot read the dataset: {error}", where=file) from error


def _batch(part: Any, file: str, first: int) -> Iterator[dict[str, Any]]:
    arrow = _pyarrow()
    columns: dict[str, list[Any]] = {}
    for name in part.schema.names:
        column = part.column(name)
        if arrow.types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
            paths, inside = column.field("path").to_pylist(), column.field("bytes").is_valid().to_pylist()
            columns[name] = [
                f"{file}#{name}:{first + i}" if has else path
                for i, (path, has) in enumerate(zip(paths, inside, strict=True))
            ]
        else:
            columns[name] = column.to_pylist()
    for i in range(part.num_rows):
        yield {name: values[i] for name, values in columns.items()}
