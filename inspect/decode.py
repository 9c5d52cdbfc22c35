"""From stored codes to wav files.

In: keys of a set and its codec. Out: one wav file a segment. Never: a file that is half written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.view import Segment, segments_of
from higgs_tune.shards.durable import atomic_file
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds, expand, undelay


def chosen_segments(shards: ShardSet, keys: tuple[str, ...], kind: str) -> Iterator[tuple[Sample, Segment]]:
    """The segments of some samples, of one kind: `ref`, `target` or `all`.

    Raises:
        UserError: there is none, or a key is unknown.
    """
    found = False
    for key in keys:
        sample = shards.read(shards.row_of(key))
        for segment in segments_of(sample, shards.special_ids):
            if kind in ("all", segment.kind):
                found = True
                yield sample, segment
    if not found:
        raise UserError(f"no {kind} segment in these samples", where=shards.location, got=", ".join(keys))


def codes_from_sequence(sample: Sample, segment: Segment, ids: SpecialIds) -> np.ndarray:
    """uint16 [K, T]: a segment's codes taken from the sequence that the model sees, the delay pattern undone.

    Raises:
        ShardError: they are not the stored codes.
    """
    seen = expand([sample], ids)
    start, width, _ = seen.segments[segment.number]
    first = int(np.searchsorted(seen.audio_at, start))
    codes_KT = undelay(seen.codes_KA[:, first : first + width]).astype(np.uint16)
    if not np.array_equal(codes_KT, segment.codes_KT):
        where = f"sample {sample.key}, segment {segment.number}"
        raise ShardError("the sequence does not give back the stored codes", where=where)
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
    single: bool = False,
) -> list[Path]:
    """Decode segments to wav files, and print one line a file.

    Args:
        output: a folder, or a name that ends in `.wav` for a single segment.
        kind: `ref`, `target` or `all`.
        delayed: go the model's way: take the codes out of the expanded sequence.
        single: one segment is wanted.

    Raises:
        UserError: several segments where one is wanted, or none.
    """
    chosen = list(chosen_segments(shards, keys, kind))
    to_file = output.suffix == ".wav"
    if (to_file or single) and len(chosen) > 1:
        found = ", ".join(f"{sample.key} {segment.number} {segment.kind}" for sample, segment in chosen[:8])
        hint = "Give one key, and --segment ref or target; or a folder to -o, without --compare."
        raise UserError("one segment is wanted", where=output, got=f"{len(chosen)}: {found}", hint=hint)
    codec = checkpoints.codec
    rate, paths = codec.config.sample_rate_hz, []
    for sample, segment in chosen:
        codes_KT = codes_from_sequence(sample, segment, shards.special_ids) if delayed else segment.codes_KT
        wave_S = codec.decode(codes_KT)
        paths.append(output if to_file else output / f"{sample.key}.{segment.number}.{segment.kind}.wav")
        write_wav(paths[-1], wave_S, rate)
        print(f"{paths[-1]}: {len(wave_S) / rate:.2f} s, {segment.frames} frames, from {segment.source}")
    return paths
