"""The derived files of a prepared folder: written in full by every run, from segments and recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.prepare.reading import converted_file
from higgs_tune.preprocess.prepare.records import (
    ACCOUNTING,
    MANIFEST,
    RECORDINGS,
    REJECTS,
    SEGMENTS,
    Recording,
    Segment,
    write_lines,
)
from higgs_tune.shards import durable

KEPT, SILENCE, UNREADABLE, DUPLICATE = "kept", "silence", "unreadable", "duplicate"


def write_outputs(out: Path, segments: Sequence[Segment], recordings: Sequence[Recording]) -> dict[str, Any]:
    """Write segments, recordings, manifest, rejects and accounting.

    Returns:
        The accounting.
    """
    write_lines(out / SEGMENTS, segments)
    write_lines(out / RECORDINGS, recordings)
    write_lines(out / MANIFEST, manifest_rows(out, segments))
    write_lines(out / REJECTS, reject_lines(segments, recordings))
    made = accounting(segments, recordings)
    durable.write_bytes(out / ACCOUNTING, durable.to_json(made, indent=1) + b"\n")
    return made


def audio_path(out: Path, segment: Segment) -> str:
    """The file that holds a segment's samples: the recording, or its conversion."""
    converted = converted_file(out, segment.sha256)
    return str(converted.absolute()) if converted.is_file() else str(Path(segment.recording).absolute())


def manifest_rows(out: Path, segments: Sequence[Segment]) -> Iterator[dict[str, Any]]:
    """One row of higgs-preprocess for each kept segment."""
    by_id = {segment.id: segment for segment in segments if segment.keep}
    for segment in by_id.values():
        row = {"id": segment.id, "text": segment.text, "speaker": segment.speaker, "split": segment.split}
        row |= _cut(out, segment, "audio", "offset", "duration")
        if segment.ref:
            other = by_id[segment.ref]
            row |= _cut(out, other, "ref_audio", "ref_offset", "ref_duration") | {"ref_text": other.text}
        for name in ("quality", "snr", "cer", "language"):
            if getattr(segment, name) is not None:
                row[name] = getattr(segment, name)
        yield row


def _cut(out: Path, segment: Segment, audio: str, offset: str, duration: str) -> dict[str, Any]:
    return {audio: audio_path(out, segment), offset: segment.start, duration: segment.milliseconds / 1000}


def reject_lines(segments: Iterable[Segment], recordings: Iterable[Recording]) -> Iterator[dict[str, Any]]:
    """One line for each recording that cannot be used and each segment that is left out."""
    for recording in recordings:
        if recording.error is not None:
            reason, _, detail = recording.error.partition(": ")
            yield {"recording": recording.path, "step": "recording", "reason": reason, "detail": detail}
    for segment in segments:
        if segment.reject is not None:
            place = {"id": segment.id, "recording": segment.recording, "start": segment.start, "end": segment.end}
            yield place | asdict(segment.reject) | {"text": segment.text, "asr_text": segment.asr_text}


def accounting(segments: Iterable[Segment], recordings: Sequence[Recording]) -> dict[str, Any]:
    """Where every second of the input went: `input_ms`, `fates_ms`, whose sum it is, and both in seconds.

    Fates are `kept`, `silence`, `unreadable`, `duplicate` (whole recordings with equal bytes) and the steps that
    rejected segments. Files of unknown length count as 0 and are numbered in `unknown_length`.
    """
    fates = Counter[str]({KEPT: 0, SILENCE: 0})
    spoken = Counter[str]()
    for segment in segments:
        spoken[segment.sha256] += segment.milliseconds
        fates[segment.reject.step if segment.reject else KEPT] += segment.milliseconds
    for recording in recordings:
        length = round(recording.seconds * 1000)
        if recording.error is None or recording.error.startswith("no_speech"):
            fates[SILENCE] += length - spoken[recording.sha256]
        else:
            fates[DUPLICATE if recording.error.startswith("same_file") else UNREADABLE] += length
    total = sum(round(recording.seconds * 1000) for recording in recordings)
    return {
        "input_ms": total,
        "fates_ms": dict(fates),
        "input": total / 1000,
        "fates": {name: length / 1000 for name, length in fates.items()},
        "unknown_length": sum(recording.error is not None and not recording.seconds for recording in recordings),
    }
