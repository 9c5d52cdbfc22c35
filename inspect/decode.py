"""Stored codes to wav files: `higgs-inspect decode`.

In: keys of a set, and its codec. Out: one wav file per segment.

Guarantees: a folder that is missing, read-only or full, and a name that holds another file, are refused before anything
is decoded; a file appears whole or not at all (tests/test_outputs.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.output import check_replaceable
from higgs_tune.inspect.view import Segment, printable, segments_of
from higgs_tune.shards.durable import check_writable, write_bytes
from higgs_tune.shards.errors import ShardError, UserError, few
from higgs_tune.shards.format import KEY_PATTERN, Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds, expand, undelay
from higgs_tune.shards.writer import file_sha256

OTHER_SUFFIXES = (".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus")
BYTES_PER_FRAME = 2 * 960  # 16-bit at 24 kHz, 25 frames a second; only predicts the disk space


def chosen_segments(shards: ShardSet, keys: tuple[str, ...], kind: str) -> Iterator[tuple[Sample, Segment]]:
    """The segments of some samples, of one kind: `ref`, `target` or `all`.

    Raises:
        UserError: there is none, or a key is unknown.
    """
    if not keys:
        raise UserError("no sample is named", expected="keys of samples, or row numbers")
    empty = True
    for key in keys:
        sample = shards.read(shards.row_of(key))
        for segment in segments_of(sample, shards.special_ids):
            if kind in ("all", segment.kind):
                empty = False
                yield sample, segment
    if empty:
        wanted = "audio" if kind == "all" else f"{kind} segment"
        raise UserError(f"these samples hold no {wanted}", where=shards.location, got=", ".join(keys))


def codes_from_sequence(sample: Sample, segment: Segment, ids: SpecialIds) -> np.ndarray:
    """uint16 [K, T]: a segment's codes out of the expanded sequence, with the delay pattern undone.

    Raises:
        ShardError: they differ from the stored codes.
    """
    expanded = expand([sample], ids)
    start, width, _ = expanded.segments[segment.number]
    first = int(np.searchsorted(expanded.audio_at, start))
    codes_KT = undelay(expanded.codes_KA[:, first : first + width]).astype(np.uint16)
    if not np.array_equal(codes_KT, segment.codes_KT):
        where = f"sample {sample.key}, segment {segment.number}"
        raise ShardError("the codes of the sequence differ from the stored codes", where=where)
    return codes_KT


def output_paths(chosen: list[tuple[Sample, Segment]], output: Path) -> list[Path]:
    """The wav file of each segment.

    Raises:
        UserError: several segments for one file, or a name that ends in another audio format's suffix.
        ShardError: a key that could lead out of the folder.
    """
    suffix = output.suffix.lower()
    if suffix in OTHER_SUFFIXES:
        raise UserError("decode writes WAV", where=output, expected="a name that ends in .wav, or a folder")
    if suffix == ".wav":
        if len(chosen) > 1:
            names = few([f"{sample.key} {segment.number} {segment.kind}" for sample, segment in chosen], 8)
            hint = "Give one key and --segment ref or target, or a folder to -o."
            raise UserError("a .wav file takes one segment", where=output, got=f"{len(chosen)}: {names}", hint=hint)
        return [output]
    for sample, _ in chosen:
        if not KEY_PATTERN.fullmatch(sample.key):
            raise ShardError("damaged key", expected=KEY_PATTERN.pattern, got=repr(sample.key))
    return [output / f"{sample.key}.{segment.number}.{segment.kind}.wav" for sample, segment in chosen]


def check_outputs(chosen: list[tuple[Sample, Segment]], paths: list[Path]) -> None:
    """Make sure that the files can be written, and that none of them replaces another file or a source recording.

    Raises:
        UserError: one cannot be written.
    """
    for (sample, _), path in zip(chosen, paths, strict=True):
        check_replaceable(path, "a WAV file", b"riff")
        if path.exists() and file_sha256(path) in [info["sha256"] for info in sample.meta["segments"]]:
            raise UserError("the output would overwrite the recording of this sample", where=path)
    sizes = [segment.frames * BYTES_PER_FRAME for _, segment in chosen]
    check_writable(paths[0].parent, sum(sizes), max(sizes))


def write_wav(path: Path, wave_S: np.ndarray, sample_rate_hz: int) -> None:
    """Write 16-bit PCM, atomically; samples beyond full scale are clipped."""
    buffer = io.BytesIO()  # libsndfile cannot report a full disk through a Python file
    soundfile.write(buffer, np.clip(wave_S, -1, 1), sample_rate_hz, format="WAV", subtype="PCM_16")
    write_bytes(path, buffer.getvalue())


def decode_to_files(
    shards: ShardSet,
    checkpoints: Checkpoints,
    keys: tuple[str, ...],
    output: Path,
    *,
    kind: str,
    delayed: bool,
) -> list[Path]:
    """Decode segments to wav files, and print one line per file.

    Args:
        output: a folder, or a name that ends in `.wav` for a single segment.
        kind: `ref`, `target` or `all`.
        delayed: take the codes out of the expanded sequence.

    Raises:
        UserError: no segment, or several for one file; or a file cannot be written.
    """
    chosen = list(chosen_segments(shards, keys, kind))
    paths = output_paths(chosen, output)
    check_outputs(chosen, paths)
    codec = checkpoints.codec
    rate = codec.config.sample_rate_hz
    for (sample, segment), path in zip(chosen, paths, strict=True):
        codes_KT = codes_from_sequence(sample, segment, shards.special_ids) if delayed else segment.codes_KT
        wave_S = codec.decode(codes_KT)
        write_wav(path, wave_S, rate)
        print(f"{path}: {len(wave_S) / rate:.2f} s, {segment.frames} frames, from {printable(segment.source)}")
    return paths
