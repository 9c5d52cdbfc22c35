"""The folder of an export: written under a temporary name, verified, then given its own.

In: files as bytes, weights as sources. Out: the folder. Guarantees (test_export.py): killed at any moment, nothing
stands under the final name; a folder under it is whole, and each weight on disk has the bytes that were computed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from higgs_tune.preprocess.checkpoints.weights import INDEX, SINGLE, weight_files
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.lock import locked
from higgs_tune.train.export.tensors import Source, byte_count, checksums_of, stored_tensors, write_tensors

SHARD_BYTES = 5 * 10**9
SPARE_BYTES = 10**8  # tokenizer, headers
LEGAL = ("licen", "notice", "copying", "use_policy", "acceptable_use", "third_party")  # beginnings of files' names


@contextmanager
def new_folder(out: Path, need_bytes: int) -> Iterator[Path]:
    """A folder to fill within the block; afterwards it is named `out`.

    Raises:
        UserError: `out` exists, another export writes it, or there is no room for `need_bytes`.
    """
    if out.exists() or out.is_symlink():
        raise UserError("the output folder exists already", where=out)
    durable.check_writable(out.parent, need_bytes + SPARE_BYTES)
    temp = out.with_name(f"{durable.TEMP_PREFIX}{out.name}")
    with locked(out.with_name(f"{temp.name}.lock"), "export", out):
        durable.remove(temp)
        temp.mkdir()
        try:
            yield temp
            for file in temp.rglob("*"):
                durable.fsync_folder(file) if file.is_dir() else durable.fsync_file(file)
            durable.fsync_folder(temp)
            temp.rename(out)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        durable.fsync_folder(out.parent)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files."""
    for name, data in files.items():
        durable.write_bytes(folder / name, data)


def write_weights(folder: Path, weights: Mapping[str, Source], shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights to one safetensors file, or to several and their index; each is read back while the next one
    is written.

    Raises:
        UserError: a weight is not finite, the disk is full, or what is read differs from what was written.
    """
    shards = _split(weights, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(1) as reader:
        checks: list[Future[None]] = []
        for name, shard in zip(names, shards, strict=True):
            part = {weight: weights[weight] for weight in shard}
            checks.append(reader.submit(verify_weights, folder / name, part, write_tensors(folder / name, part)))
        for check in checks:
            check.result()
    if len(shards) > 1:
        file_of = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        index = {"metadata": {"total_size": sum(map(byte_count, weights.values()))}, "weight_map": file_of}
        durable.write_bytes(folder / INDEX, durable.to_json(index, indent=2) + b"\n")
    weight_files(folder)  # index and files agree


def verify_weights(file: Path, weights: Mapping[str, Source], checksums: Mapping[str, str]) -> None:
    """Fsync a file of weights, read it back, and compare it with what was written.

    Raises:
        UserError: they differ, or the disk fails.
    """
    durable.fsync_file(file)
    for name, stored in stored_tensors(file).items():
        wanted = weights.get(name)
        if wanted is None or (stored.shape, stored.dtype) != (wanted.shape, wanted.dtype):
            raise UserError(f"verifying the export: {name} is not as it was written", where=file)
    found = checksums_of(file)
    if wrong := sorted(name for name in {*found, *checksums} if found.get(name) != checksums.get(name)):
        raise UserError("verifying the export: weights on disk differ from those that were written", where=file,
                        expected="the same bytes", got=", ".join(wrong[:3]), hint="Check the disk.")  # fmt: skip


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _split(weights: Mapping[str, Source], shard_bytes: int) -> list[list[str]]:
    """Names of the weights of each file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, source in weights.items():
        if shards[-1] and size + byte_count(source) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += byte_count(source)
    return shards


def copy_legal_files(base: Path, folder: Path) -> list[str]:
    """Copy the licence and notice files of the base, with folders of them; gives their names."""
    copied = []
    for path in sorted(base.iterdir()):
        if path.name.lower().startswith(LEGAL):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    return copied
