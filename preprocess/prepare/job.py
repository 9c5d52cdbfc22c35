"""What a task of higgs-prepare gets, what it says of a recording, and how its results are named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.prepare.config import PrepareConfig
from higgs_tune.preprocess.prepare.listen import Vad
from higgs_tune.preprocess.prepare.segment import Cutting
from higgs_tune.preprocess.prepare.stages import Stages
from higgs_tune.preprocess.prepare.transcripts import Transcript

VERSION = 4  # of the stages' algorithms: a change makes every stored result an old one


@dataclass(frozen=True)
class PrepareJob:
    """The options with absolute paths, and what the models are; every task gets it.

    Attributes:
        recordings: paths as they are given.
        judges: identity of the models of `asr`, `second_asr`, `quality`, `sound_model`, `speaker_model`, where one is
            used.
    """

    config: PrepareConfig
    out: Path
    recordings: tuple[str, ...]
    vad: Vad
    vad_revision: str
    judges: dict[str, str]

    @property
    def cutting(self) -> Cutting:
        c = self.config
        pad, most = (round(seconds * 1000) for seconds in (c.pad_seconds, c.max_seconds))
        least, gap, pause = (round(seconds * 1000) for seconds in (c.min_seconds, c.min_pause, c.max_pause))
        return Cutting(least - 2 * pad, most - 2 * pad, gap, pause, pad, c.vad_threshold)


@dataclass(frozen=True)
class Facts:
    """What is known of a recording. error: why it cannot be used. total_ms: 0 where the length is not known.

    Attributes:
        transcript: the one beside it, or `bad_transcript`, why it cannot be used; both None where there is none.
    """

    number: int
    sha256: str = ""
    total_ms: int = 0
    rate: int = 0
    channels: int = 0
    error: str | None = None
    transcript: Transcript | None = None
    bad_transcript: str | None = None


def depends_on(job: PrepareJob, cut_key: str, name: str) -> dict[str, Any]:
    """What a stage of the segments depends on."""
    depends: dict[str, Any] = {"cut": cut_key, "version": VERSION, "judge": job.judges.get(name, "")}
    if name in ("asr", "second_asr"):
        depends |= {"language": job.config.spoken, "detect": bool(job.config.language)}
    if name == "sound_model":
        depends |= {"labels": list(job.config.sound_labels)}
    if name == "quality":
        depends |= {"quick": True}  # earlier results are of another rule
    return depends


def stored_texts(job: PrepareJob, stages: Stages, cut_key: str, name: str) -> list[str] | None:
    """What a recogniser (`asr`, `second_asr`) heard in each segment; None where there is no such recogniser."""
    stored = stages.read(name, depends_on(job, cut_key, name)) if job.judges.get(name) else None
    return stored.meta["texts"] if stored else None
