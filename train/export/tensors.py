"""Weights that are read and written a few rows at a time, so that no tensor need lie in memory whole.

In: safetensors files. Out: `Source` objects, which give rows of one tensor; and a safetensors file made of them, with a
checksum of each tensor. A tensor without dimensions counts as one row.
Guarantees (test_export.py): the file is what safetensors' own writer makes of the same tensors.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Protocol

import torch
from higgs_tune.preprocess.checkpoints.weights import DOWNLOAD_AGAIN, all_finite, read_header
from higgs_tune.shards.errors import UserError
from xxhash import xxh3_128

CHUNK_BYTES = 4 * 2**20  # of float32; memory of this size is used again, larger pieces are fresh pages each time
THREADS = 2
Shape = tuple[int, ...]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Source(Protocol):
    """A tensor that gives its rows."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, from byte `offset` on."""

    file: Path
    offset: int
    shape: Shape
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows, read from the file.

        Raises:
            UserError: the file has become shorter.
        """
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * width)
            done, view = 0, data.numpy().data
            while done < len(data):
                count = stream.readinto(view[done:])
                if not count:
                    raise UserError("cannot read weights: the file ends early", where=self.file, hint=DOWNLOAD_AGAIN)
                done += count
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return data.view(self.dtype).reshape(shape)

    def whole(self) -> torch.Tensor:
        """The tensor."""
        return self.rows(0, row_count(self.shape))


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros."""

    shape: Shape
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of zeros."""
        return torch.zeros((stop - start, *self.shape[1:]), dtype=self.dtype)


@dataclass(frozen=True)
class Held:
    """A tensor in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of it."""
        return self.tensor[start:stop] if self.tensor.ndim else self.tensor


@dataclass(frozen=True)
class Cast:
    """A tensor in another dtype."""

    source: Source
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return self.source.shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows, cast."""
        return self.source.rows(start, stop).to(self.dtype)


def row_count(shape: Shape) -> int:
    """Rows of a tensor."""
    return shape[0] if shape else 1


def byte_count(source: Source) -> int:
    """Bytes of a tensor."""
    return math.prod(source.shape) * source.dtype.itemsize


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        UserError: the file is damaged, or has tensors of a dtype that checkpoints do not have.
    """
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    stored: dict[str, Stored] = {}
    for name, entry in read_header(file).items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"unsupported dtype of {name}", where=file, expected=", ".join(_DTYPES), got=entry["dtype"])
        shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        stored[name] = Stored(file, start + entry["data_offsets"][0], shape, dtype)
    return stored


def chunks(source: Source) -> Iterator[torch.Tensor]:
    """All rows of a tensor, some at a time, each contiguous."""
    for start, stop in _ranges(source):
        yield source.rows(start, stop).contiguous()


def _ranges(source: Source) -> Iterator[tuple[int, int]]:
    rows = row_count(source.shape)
    step = max(1, CHUNK_BYTES // max(1, 4 * math.prod(source.shape[1:])))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _finite_chunks(name: str, source: Source, pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
    """The chunks of a tensor, computed by threads while earlier ones are written.

    Raises:
        UserError: one holds NaN or infinite values.
    """

    def chunk(start: int, stop: int) -> torch.Tensor:
        rows = source.rows(start, stop).contiguous()
        if not all_finite(rows):
            raise UserError(f"{name} holds NaN or infinite values as {source.dtype}", expected="finite weights",
                            hint="Are base and adapter whole?")  # fmt: skip
        return rows

    waiting: deque[Future[torch.Tensor]] = deque()
    for start, stop in _ranges(source):
        waiting.append(pool.submit(chunk, start, stop))
        if len(waiting) > 2 * THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_tensors(file: Path, tensors: Mapping[str, Source]) -> dict[str, str]:
    """Write a safetensors file, not yet fsynced; gives the checksum of each tensor's bytes.

    Raises:
        UserError: a tensor holds NaN or infinite values, or the disk is full.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # so that each is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + byte_count(tensors[name])
        dtype = _NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums: dict[str, str] = {}
    try:
        with file.open("wb", buffering=0) as stream, ThreadPoolExecutor(THREADS) as pool:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                checksums[name] = _write(stream, _finite_chunks(name, tensors[name], pool))
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", where=file) from error
    return checksums


def _write(stream: RawIOBase, pieces: Iterable[torch.Tensor]) -> str:
    checksum = xxh3_128()
    for chunk in pieces:
        data = chunk.reshape(-1).view(torch.uint8).numpy().data
        checksum.update(data)
        while data:
            data = data[stream.write(data) or 0 :]
    return checksum.hexdigest()


def checksums_of(file: Path) -> dict[str, str]:
    """The checksum of each tensor's bytes, read from a file.

    Raises:
        UserError: the file is damaged.
    """
    found: dict[str, str] = {}
    for name, stored in stored_tensors(file).items():
        checksum = xxh3_128()
        for chunk in chunks(stored):
            checksum.update(chunk.reshape(-1).view(torch.uint8).numpy().data)
        found[name] = checksum.hexdigest()
    return found
