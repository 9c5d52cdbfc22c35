"""What is said in each segment, by the transcript or by the recogniser.

In: segments, the recording's transcript, what recognisers heard. Out: a text a segment, or why there is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.preprocess.prepare.align import divide_text
from higgs_tune.preprocess.prepare.job import VERSION, PrepareJob, depends_on, stored_texts
from higgs_tune.preprocess.prepare.records import UNREADABLE_TRANSCRIPT, TextSource
from higgs_tune.preprocess.prepare.stages import Result, Stages
from higgs_tune.preprocess.prepare.transcripts import Transcript, text_between

Realign = Callable[[list[str], list[list[int]]], list[list[int]]]


@dataclass(frozen=True)
class Spoken:
    """Text, its source and speaker (or empty) of a segment; `missing` says why there is no text."""

    text: str = ""
    source: TextSource | None = None
    speaker: str = ""
    missing: str = ""


def spoken_texts(
    job: PrepareJob,
    stages: Stages,
    cut: Result,
    transcript: Transcript | None,
    bad_transcript: str | None = None,
    realign: Realign | None = None,
) -> list[Spoken]:
    """What is said in each segment of a recording. The division of a long text is stored.

    Args:
        realign: moves words by a CTC recogniser; asked only where one is used and the division is not stored yet.
    """
    spans: list[list[int]] = cut.meta["segments"]
    heard = stored_texts(job, stages, cut.key, "asr")
    missing = UNREADABLE_TRANSCRIPT if bad_transcript else "no_transcript" if not (transcript or heard) else ""
    if missing:
        return [Spoken(missing=missing)] * len(spans)
    if transcript is None:
        return [Spoken(text, "asr") if text.strip() else Spoken(missing="nothing_heard") for text in heard or ()]
    if transcript.kind != "text":
        return [_said_between(transcript, start, end) for start, end in spans]
    if cut.meta["whole"] and len(spans) == 1:
        return [_spoken(transcript.pieces[0].text, "", "given")]
    if heard is None:
        return [Spoken(missing="unaligned_transcript")] * len(spans)
    texts = _divided(job, stages, cut, transcript.pieces[0].text, heard, realign)
    return [_spoken(text, "", "aligned") for text in texts]


def _said_between(transcript: Transcript, start: int, end: int) -> Spoken:
    text, speakers = text_between(transcript, start, end)
    if len(speakers) > 1:
        return Spoken(missing="several_speakers")
    return _spoken(text, "".join(speakers), "given")


def _spoken(text: str, speaker: str, source: TextSource) -> Spoken:
    return Spoken(text, source, speaker) if text.strip() else Spoken(speaker=speaker, missing="not_in_transcript")


def _divided(
    job: PrepareJob, stages: Stages, cut: Result, text: str, heard: list[str], realign: Realign | None
) -> list[str]:
    """The piece of a long text that is said in each segment."""
    recognised = stages.read("asr", depends_on(job, cut.key, "asr"))
    ctc = bool(recognised and recognised.meta["ctc"])
    depends = {
        "cut": cut.key,
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "heard": hashlib.sha256("\n".join(heard).encode()).hexdigest(),
        "normaliser": job.config.normaliser,
        "ctc": job.judges["asr"] if ctc else "",
        "version": VERSION,
    }
    stored = stages.read("align", depends)
    if stored is None:
        words = text.split()
        numbers = divide_text(words, heard, normaliser(job.config.normaliser).apply)
        if ctc:
            assert realign is not None, "a stage of the recording's task"
            numbers = realign(words, numbers)
        texts = [" ".join(words[number] for number in part) for part in numbers]
        stored = stages.write("align", depends, {"texts": texts})
    return stored.meta["texts"]
