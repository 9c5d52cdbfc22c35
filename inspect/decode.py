"""Stored codes to wav files: `higgs-inspect decode`.

In: keys of a set, and its codec. Out: one wav file per segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.view import Segment, segments_of
from higgs_tune.shards.durable import atomic_file
from higgs_tune.shards.errors import ShardError, UserError, few
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds, expand, undelay


def chosen_segments(shards: ShardSet, keys: tuple[str, ...], kind: str) -> Iterator[tuple[Sample, Segment]]:
    """The segments of some samples, of one kind: `ref`, `target` or `all`.

    Raises:
        UserError: there is none, or a key is unknown.
    """
    empty = True
    for key in keys:
        sample = shards.read(shards.row_of(key))
        for segment in segments_of(sample, shards.special_ids):
            if kind in ("all", segment.kind):
                empty = False
                yield sample, segment
    if empty:
        raise UserError(f"no {kind} segment in these samples", where=shards.location, got=", ".join(keys))


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


def write_wav(path: Path, wave_S: np.ndarray, sample_rate_hz: int) -> None:
    """Write 16-bit PCM, atomically; samples beyond full scale are clipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        soundfile.write(file, np.clip(wave_S, -1, 1), sample_rate_hz, format="WAV", subtype="PCM_16")


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
        UserError: no segment, or several for one file.
    """
    chosen = list(chosen_segments(shards, keys, kind))
    to_file = output.suffix == ".wav"
    if to_file and len(chosen) > 1:
        names = few([f"{sample.key} {segment.number} {segment.kind}" for sample, segment in chosen], 8)
        hint = "Give one key and --segment ref or target, or a folder to -o."
        raise UserError("a .wav file takes one segment", where=output, got=f"{len(chosen)}: {names}", hint=hint)
    codec = checkpoints.codec
    rate, paths = codec.config.sample_rate_hz, []
    for sample, segment in chosen:
        codes_KT = codes_from_sequence(sample, segment, shards.special_ids) if delayed else segment.codes_KT
        wave_S = codec.decode(codes_KT)
        paths.append(output if to_file else output / f"{sample.key}.{segment.number}.{segment.kind}.wav")
        write_wav(paths[-1], wave_S, rate)
        print(f"{paths[-1]}: {len(wave_S) / rate:.2f} s, {segment.frames} frames, from {segment.source}")
    return paths
