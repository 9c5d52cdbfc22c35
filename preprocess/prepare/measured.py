"""Segments with their measurements, from the stored results of a recording's stages; nothing is decided yet.

Shapes: N segments, D embedding dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.preprocess.prepare.decide import error_rate, pace
from higgs_tune.preprocess.prepare.job import Facts, PrepareJob, depends_on, stored_texts
from higgs_tune.preprocess.prepare.records import RejectReason, Segment, segment_id
from higgs_tune.preprocess.prepare.spoken import Spoken, spoken_texts
from higgs_tune.preprocess.prepare.stages import Result, Stages
from higgs_tune.preprocess.prepare.work import cut_of
from higgs_tune.preprocess.text_normalization import normalize_text


def measured_segments(job: PrepareJob, facts: Facts) -> tuple[list[Segment], np.ndarray | None]:
    """The segments of a recording in the order of time, and their embeddings (float16 [N, D], zero where none)."""
    stages = Stages(job.out)
    cut = cut_of(job, stages, facts)
    spoken = spoken_texts(job, stages, cut, facts.transcript, facts.bad_transcript)
    named = _Values(job, stages, cut)
    segments = [_segment(job, facts, named, at, spoken[at]) for at in range(len(cut.meta["segments"]))]
    for name in ("too_short", "no_pause"):
        for start, end in cut.meta[name]:
            reason = RejectReason("segment", name, (end - start) / 1000, _bound(job, name))
            segments.append(replace(_bare(job, facts, start, end), reject=reason))
    order = sorted(range(len(segments)), key=lambda at: segments[at].start)
    embeddings_ND = named.embeddings
    if embeddings_ND is not None:
        rows_ND = np.zeros((len(segments), embeddings_ND.shape[1]), np.float16)
        rows_ND[: len(embeddings_ND)] = embeddings_ND
        embeddings_ND = rows_ND[order]
    return [segments[at] for at in order], embeddings_ND


def _bound(job: PrepareJob, name: str) -> float:
    return job.config.min_seconds if name == "too_short" else job.config.max_seconds


class _Values:
    """The stored values of a recording's segments, by number; None where something was not measured."""

    def __init__(self, job: PrepareJob, stages: Stages, cut: Result) -> None:
        self.cut = cut
        self.heard, self.second = (stored_texts(job, stages, cut.key, name) for name in ("asr", "second_asr"))
        found = {
            name: stages.read(name, depends_on(job, cut.key, name))
            for name in ("asr", "quality", "sound_model", "fingerprint", "speaker_model")
            if name == "fingerprint" or job.judges.get(name)
        }
        self._results = {name: result for name, result in found.items() if result}
        voices = self._results.get("speaker_model")
        self.embeddings: np.ndarray | None = voices.arrays["embeddings"] if voices else None

    def value(self, name: str, at: int) -> Any:
        result = self._results.get(name)
        return result.meta["values"][at] if result else None

    def language(self, at: int) -> tuple[str | None, float | None]:
        languages = self._results["asr"].meta["languages"] if "asr" in self._results else ()
        return tuple(languages[at]) if languages else (None, None)


def _bare(job: PrepareJob, facts: Facts, start: int, end: int) -> Segment:
    key = segment_id(facts.sha256, start, end)
    return Segment(key, job.recordings[facts.number], facts.sha256, start / 1000, end / 1000)


def _segment(job: PrepareJob, facts: Facts, named: _Values, at: int, spoken: Spoken) -> Segment:
    bare, apply = _bare(job, facts, *named.cut.meta["segments"][at]), normaliser(job.config.normaliser).apply
    text = normalize_text(spoken.text, job.config.text_normalization) if spoken.source else None
    heard = named.heard[at] if named.heard else None
    language, probability = named.language(at)
    if spoken.source == "asr":
        cer = error_rate(heard or "", named.second[at], apply) if named.second else None
    else:
        cer = error_rate(text, heard, apply) if text is not None and heard is not None else None
    return replace(
        bare,
        text=text,
        text_source=spoken.source,
        asr_text=heard,
        cer=cer,
        quality=named.value("quality", at),
        snr=named.cut.meta["snr"][at],
        clipping=named.cut.meta["clipping"][at],
        sound=named.value("sound_model", at),
        seconds_per_char=pace(bare, text) if text else None,
        language=language,
        language_probability=probability,
        fingerprint=named.value("fingerprint", at),
        speaker=_speaker(job, spoken, bare.recording),
        reject=RejectReason("text", spoken.missing, facts.bad_transcript) if spoken.missing else None,
    )


def _speaker(job: PrepareJob, spoken: Spoken, recording: str) -> str | None:
    """The speaker's name where one is given; None: voices will tell."""
    if spoken.speaker or job.config.speaker:
        return spoken.speaker or job.config.speaker
    if job.judges.get("speaker_model"):
        return None
    path = Path(recording)
    return str(path.parent if job.config.speaker_by == "folder" else path.with_suffix(""))
