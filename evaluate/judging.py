"""Judging clips: from the wavs of a system to transcripts, embeddings and predicted quality.

In: lines, and the file that each system said for each. Out: one `Judgement` a line; a missing or unusable file is one
with a problem, never left out. Files are matched by id, never by order.

Shapes: S samples, D embedding dimensions.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from higgs_tune.evaluate.lists import SHOWN, Line, line_name
from higgs_tune.evaluate.store import JudgementStore, pack_vector, unpack_vector
from higgs_tune.preprocess.audio.audio import load_clip
from higgs_tune.preprocess.audio.clip import Clip, Waveform
from higgs_tune.preprocess.audio.levels import quiet_share
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.audio.source import audio_sha256
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ, Judge, QualityModel, Recogniser, SpeakerEncoder
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError, few

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
SILENCE_DBFS = -45.0  # a 20 ms window below this level is silent, as in the trainer's samples
REFERENCE_SECONDS = 600.0  # longest reference clip
BAD_LINE = "bad_line"  # problem of a line whose list does not tell what to speak


@dataclass(frozen=True)
class Judges:
    """The models at work; None where one was not asked for.

    Attributes:
        asr_language: what it is told instead of any language: its own name for it.
    """

    recogniser: Recogniser
    speaker: SpeakerEncoder | None = None
    quality: QualityModel | None = None
    asr_language: str = ""

    def describe(self) -> dict[str, Any]:
        """Names and revisions, for tables and for the store."""

        def of(judge: Judge | None) -> dict[str, str] | None:
            return {"name": judge.name, "revision": judge.revision} if judge else None

        return {"asr": of(self.recogniser), "speaker": of(self.speaker), "quality": of(self.quality)}


@dataclass(frozen=True)
class Judgement:
    """One clip as judged.

    Attributes:
        heard: transcript; empty where the clip is missing or unusable.
        seconds, silence: length, and share of silent windows; None without a usable clip.
        problem, detail: a short fixed name and what was wrong; empty: nothing.
        embedding_D, quality: None where there is no such judge, or no usable clip.
        sha256: of the file; empty without one.
        cut_off: whether the model did not end by itself.
    """

    heard: str = ""
    seconds: float | None = None
    silence: float | None = None
    problem: str = ""
    detail: str = ""
    embedding_D: np.ndarray | None = None
    quality: dict[str, float] | None = None
    sha256: str = ""
    cut_off: bool = False

    @property
    def usable(self) -> bool:
        """Whether there is a clip that was judged."""
        return self.seconds is not None and self.problem != "silent_audio"


class System(Protocol):
    """What spoke the lines."""

    def path(self, line: Line) -> str:
        """The line's file; where there is none, the path that was expected."""
        ...

    def amend(self, line: Line, given: Judgement) -> Judgement:
        """The judgement of the line's file, with what the system itself tells of it."""
        ...

    def strangers(self, lines: Iterable[Line]) -> list[str]:
        """Ids of files that belong to no line."""
        ...


class WavFolder:
    """The files of one system's folder, by id: `ID.wav`, `ID.flac`, …, below it.

    Raises:
        UserError: no such folder, or two files for one id.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError("no such folder of wavs", where=folder)
        self.folder = folder
        self._files: dict[str, Path] = {}  # by id, composed: some file systems decompose letters with marks
        twice = []
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                key = _composed(path.relative_to(folder).with_suffix("").as_posix())
                twice += [key] if key in self._files else []
                self._files[key] = path
        if twice:
            raise UserError(f"{len(twice)} ids have several files: {few(twice, SHOWN)}", where=folder)

    def path(self, line: Line) -> str:
        """The line's file; where there is none, the path that was expected."""
        name = line_name(line.id)
        return str(self._files.get(_composed(name), self.folder / f"{name}.wav"))

    def amend(self, line: Line, given: Judgement) -> Judgement:
        """The judgement as it is: nothing else is known of a file."""
        return given

    def strangers(self, lines: Iterable[Line]) -> list[str]:
        """Ids of files that belong to no line."""
        return sorted(self._files.keys() - {_composed(line_name(line.id)) for line in lines})


def _composed(key: str) -> str:
    return unicodedata.normalize("NFC", key)


@dataclass
class Judging:
    """Judges the clips of one system after another, with one store.

    Attributes:
        max_seconds: a longer clip is a problem (`too_long`), not a judgement.
        batch_size: clips that the recogniser gets at once.
        progress: called with the number of clips done.
    """

    judges: Judges
    store: JudgementStore
    max_seconds: float = 60.0
    batch_size: int = 8
    progress: Callable[[int], None] = lambda _count: None

    def judge(self, lines: list[Line], path_of: Callable[[Line], str]) -> list[Judgement]:
        """One judgement a line, in order; those in the store are taken from it."""
        judged: dict[int, Judgement] = {}
        waiting: list[tuple[int, Line, Waveform]] = []
        for number, line in enumerate(lines):
            known = Judgement(problem=BAD_LINE, detail=line.fault) if line.fault else self._known(path_of(line), line)
            if known is None:
                loaded = self._load(path_of(line), self.max_seconds)
                if isinstance(loaded, Waveform):
                    waiting.append((number, line, loaded))
                else:
                    judged[number] = loaded
            else:
                judged[number] = known
            if len(waiting) == self.batch_size:
                judged |= self._ask(waiting)
                waiting = []
            self.progress(len(judged))
        judged |= self._ask(waiting)
        self.progress(len(judged))
        return [judged[number] for number in range(len(lines))]

    def embed_references(self, lines: list[Line]) -> dict[str, np.ndarray | str]:
        """The embedding of each line's reference clip, by path, or why there is none; empty without an encoder."""
        if not self.judges.speaker:
            return {}
        return {path: self._embed_reference(path) for path in dict.fromkeys(line.ref_audio for line in lines)}

    def _embed_reference(self, path: str) -> np.ndarray | str:
        assert self.judges.speaker
        sha256 = _hash(path)
        known = sha256 and self.store.get(f"reference {sha256}")
        if known:
            embedding_D = unpack_vector(known["embedding"])
            assert embedding_D is not None
            return embedding_D
        loaded = self._load(path, REFERENCE_SECONDS)
        if isinstance(loaded, Judgement):
            return f"{loaded.problem}: {loaded.detail}"
        embedding_D = self.judges.speaker.embed(loaded.samples_S)
        if not np.isfinite(embedding_D).all() or not embedding_D.any():
            return f"{self.judges.speaker.name} finds no voice in {path}"
        self.store.put(f"reference {loaded.sha256}", {"embedding": pack_vector(embedding_D)})
        return embedding_D

    def _key(self, sha256: str, line: Line) -> str:
        return f"{sha256} {self.judges.asr_language or line.language}"

    def _known(self, path: str, line: Line) -> Judgement | None:
        sha256 = _hash(path)
        entry = self.store.get(self._key(sha256, line)) if sha256 else None
        if entry is None or entry["seconds"] > self.max_seconds:
            return None
        named = {name: entry[name] for name in ("heard", "seconds", "silence", "problem", "quality")}
        return Judgement(**named, embedding_D=unpack_vector(entry["embedding"]), sha256=sha256)

    def _load(self, path: str, max_seconds: float) -> Waveform | Judgement:
        """The waveform, or the judgement that there is none."""
        if not path:
            return Judgement(problem="missing_audio", detail="the list names none")
        try:
            wave = load_clip(Clip(path, path), SAMPLE_RATE_HZ, AudioOptions(0.0, max_seconds))
        except Reject as reject:
            return Judgement(problem=reject.reason, detail=reject.detail, sha256=_hash(path))
        if not wave.samples_S.any():
            return Judgement("", wave.seconds, 1.0, "silent_audio", "all samples are 0", sha256=wave.sha256)
        return wave

    def _ask(self, batch: list[tuple[int, Line, Waveform]]) -> dict[int, Judgement]:
        """Judge the clips of a batch; the recogniser gets those of one language together."""
        heard: dict[int, str] = {}
        for language in dict.fromkeys(line.language for _, line, _ in batch):
            part = [(number, wave) for number, line, wave in batch if line.language == language]
            heard |= self._transcribe(part, self.judges.asr_language or language)
        judged = {}
        for number, line, wave in batch:
            judged[number] = self._judgement(wave, heard[number].strip())
            self._remember(self._key(wave.sha256, line), judged[number])
        return judged

    def _transcribe(self, part: list[tuple[int, Waveform]], language: str) -> dict[int, str]:
        texts = self.judges.recogniser.transcribe([wave.samples_S for _, wave in part], language)
        if len(texts) != len(part):
            name = self.judges.recogniser.name
            raise UserError("the recogniser lost clips", where=name, expected=f"{len(part)} texts", got=len(texts))
        return {number: text for (number, _), text in zip(part, texts, strict=True)}

    def _judgement(self, wave: Waveform, heard: str) -> Judgement:
        speaker, quality = self.judges.speaker, self.judges.quality
        scores = quality.score(wave.samples_S) if quality else None
        return Judgement(
            heard=heard,
            seconds=round(wave.seconds, 4),
            silence=round(quiet_share(wave.samples_S[:, None], SAMPLE_RATE_HZ, below_dbfs=SILENCE_DBFS), 4),
            problem="" if heard else "nothing_heard",
            embedding_D=speaker.embed(wave.samples_S) if speaker else None,
            quality=scores and {name: round(score, 4) for name, score in scores.items() if np.isfinite(score)},
            sha256=wave.sha256,
        )

    def _remember(self, key: str, given: Judgement) -> None:
        entry = {name: getattr(given, name) for name in ("heard", "seconds", "silence", "problem", "quality")}
        self.store.put(key, entry | {"embedding": pack_vector(given.embedding_D)})


def _hash(path: str) -> str:
    """SHA-256 of a clip; empty where there is none."""
    try:
        return audio_sha256(path) if path else ""
    except Reject:
        return ""
