"""The stages of one recording, each stored by content: listen, cut, hear, align, measure.

In: a recording's number. Out: what is known of it (`Facts`), and the stored results of its stages, from which
`measured.py` makes its segments without audio or models.

Shapes: S samples.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.encode import one_thread
from higgs_tune.preprocess.judges.interface import (
    CtcAligner,
    LanguageDetector,
    QualityModel,
    Recogniser,
    SoundModel,
    SpeakerEncoder,
)
from higgs_tune.preprocess.prepare.align import Symbols, realign
from higgs_tune.preprocess.prepare.fingerprint import fingerprint
from higgs_tune.preprocess.prepare.job import VERSION, Facts, PrepareJob, depends_on
from higgs_tune.preprocess.prepare.listen import Listened, listen
from higgs_tune.preprocess.prepare.measure import clipping, signal_to_noise
from higgs_tune.preprocess.prepare.reading import Form, read_cut, read_form, usable_file
from higgs_tune.preprocess.prepare.segment import Span, cut_recording, find_speech
from higgs_tune.preprocess.prepare.spoken import Realign, spoken_texts
from higgs_tune.preprocess.prepare.stages import PARTS, Result, Stages
from higgs_tune.preprocess.prepare.transcripts import (
    BadTranscript,
    Transcript,
    boundaries,
    find_transcript,
    read_transcript,
    refuse_later,
    turns,
)
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.writer import file_sha256

PART = 16
JUDGED = ("asr", "second_asr", "quality", "sound_model", "speaker_model")
NO_SPEECH = "no_speech: nobody speaks in it"


def prepare_recording(job: PrepareJob, number: int) -> Facts:
    """Task: all stages of one recording; what is stored already is not computed again."""
    path, stages = Path(job.recordings[number]), Stages(job.out)
    facts = Facts(number)
    try:
        job.recordings[number].encode()
        sha256 = _hashed(stages, path)
        facts = Facts(number, sha256)
        file = usable_file(path, job.out, sha256)
        form = read_form(file)
        facts = Facts(number, sha256, round(form.frames * 1000 / form.rate), form.rate, form.channels)
        heard = _listen(job, stages, sha256, file, form)
    except UnicodeEncodeError:
        return Facts(number, error="unusable_name: the name is not UTF-8; rename the file")
    except Reject as reject:
        return Facts(number, facts.sha256, facts.total_ms, facts.rate, facts.channels, str(reject))
    except OSError as error:
        return Facts(number, error=f"unreadable_audio: {error.strerror}")
    transcript, bad = _read_given(job, path, facts.total_ms)
    facts = replace(facts, transcript=transcript, bad_transcript=bad)
    cut = cut_of(job, stages, facts, heard)
    spans = [Span(*span) for span in cut.meta["segments"]]
    if not any(cut.meta[name] for name in ("segments", "too_short", "no_pause")):
        return replace(facts, error=NO_SPEECH)
    if spans:
        with one_thread():  # the number of threads changes the last bits of a sum
            _Measuring(job, stages, file, cut.key, spans).run()
            spoken_texts(job, stages, cut, transcript, bad, _aligner(job, file, spans))
    return facts


def _aligner(job: PrepareJob, file: Path, spans: list[Span]) -> Realign:
    """Moves words between segments by the recogniser's probabilities."""

    def move(words: list[str], divided: list[list[int]]) -> list[list[int]]:
        recogniser = _recogniser(job.config.asr, job.config.device)
        assert isinstance(recogniser, CtcAligner)
        symbols = Symbols([recogniser.symbols(word) for word in words], recogniser.blank, recogniser.between)

        def log_probs(at: int) -> np.ndarray:
            return recogniser.log_probs([read_cut(file, *spans[at])], job.config.spoken)[0]

        return realign(divided, log_probs, symbols)

    return move


def _hashed(stages: Stages, path: Path) -> str:
    """The SHA-256 of a file, which is not read again while its size and time stay as they are."""
    if not path.is_file():
        raise Reject("missing_audio", "no such file" if not path.exists() else "no regular file", str(path))
    status = path.stat()
    depends = {"path": str(path.absolute()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    stored = stages.read("file", depends) or stages.write("file", depends, {"sha256": file_sha256(path)})
    return stored.meta["sha256"]


def _listen(job: PrepareJob, stages: Stages, sha256: str, file: Path, form: Form) -> Listened:
    depends = {"sha256": sha256, "vad": job.vad, "revision": job.vad_revision, "version": VERSION}
    stored = stages.read("listen", depends)
    if stored is None:
        stored = stages.write("listen", depends, {}, vars(listen(file, form, job.vad)))
    return Listened(**stored.arrays)


def _read_given(job: PrepareJob, path: Path, total_ms: int) -> tuple[Transcript | None, str | None]:
    """The recording's transcript, or why it cannot be used."""
    file = find_transcript(path, job.config.transcripts)
    if file is None:
        return None, None
    try:
        transcript = read_transcript(file)
        refuse_later(transcript, total_ms)
    except BadTranscript as bad:
        return None, f"{file.name}: {bad}".encode("utf-8", "backslashreplace").decode()
    return transcript, None


def cut_of(job: PrepareJob, stages: Stages, facts: Facts, heard: Listened | None = None) -> Result:
    """Segments, with what the first pass tells of them: stored, or made from what was heard in it."""
    transcript = facts.transcript
    depends = {"sha256": facts.sha256, "vad": job.vad, "revision": job.vad_revision, "cutting": vars(job.cutting)}
    places = boundaries(transcript) if transcript else None
    changes = turns(transcript) if transcript else []
    depends |= {
        "boundaries": places,
        "turns": changes,
        "text": bool(transcript and transcript.kind == "text"),
        "version": VERSION,
    }
    stored = stages.read("cut", depends)
    if stored is None:
        assert heard is not None, "listened before"
        stored = stages.write("cut", depends, _cut(job, facts, heard, places, changes, depends["text"]))
    return stored


def _cut(
    job: PrepareJob, facts: Facts, heard: Listened, places: list[int] | None, changes: list[int], text: bool
) -> dict[str, Any]:
    speech = find_speech(heard, facts.total_ms, job.cutting.vad_threshold)
    whole = text and bool(speech) and speech[-1].end - speech[0].start <= job.cutting.max_ms
    cuts = cut_recording(heard, facts.total_ms, job.cutting, [] if whole else places, changes)
    meta: dict[str, Any] = {name: [list(span) for span in spans] for name, spans in vars(cuts).items()}
    meta |= {"snr": signal_to_noise(heard, cuts.segments, speech), "whole": whole}
    return meta | {"clipping": [clipping(heard, span) for span in cuts.segments]}


class _Measuring:
    """All that needs the samples of the segments: recognisers, quality, voice, fingerprint; one stage each.

    Each stage is made in parts of `PART` segments, so that a kill loses little of a long recording.
    """

    def __init__(self, job: PrepareJob, stages: Stages, file: Path, cut_key: str, spans: list[Span]) -> None:
        self.job, self.stages, self.file, self.cut_key, self.spans = job, stages, file, cut_key, spans

    def run(self) -> None:
        names = [name for name in JUDGED if self.job.judges.get(name)] + ["fingerprint"]
        names = [name for name in names if self.stages.read(name, self._depends(name)) is None]
        places = range(0, len(self.spans), PART)
        parts = [self._part(names, at) for at in places] if names else []
        for name in names:
            made = [part[name] for part in parts]
            meta = made[0].meta | {key: [one for part in made for one in part.meta[key]]
                                   for key, value in made[0].meta.items() if isinstance(value, list)}  # fmt: skip
            arrays = {key: np.concatenate([part.arrays[key] for part in made]) for key in made[0].arrays}
            self.stages.write(name, self._depends(name), meta, arrays)

    def _depends(self, name: str) -> dict[str, Any]:
        return depends_on(self.job, self.cut_key, name)

    def _part(self, names: list[str], begin: int) -> dict[str, Result]:
        """The results of the segments from number `begin` on; audio is read if one is missing."""
        depends = {name: {"stage": name, "of": self._depends(name), "begin": begin} for name in names}
        found = {name: self.stages.read(PARTS, depends[name]) for name in names}
        missing = [name for name in names if found[name] is None]
        waves = [read_cut(self.file, *span) for span in self.spans[begin : begin + PART]] if missing else []
        for name in missing:
            found[name] = self.stages.write(PARTS, depends[name], *self._measure(name, waves))
        return {name: result for name, result in found.items() if result is not None}

    def _measure(self, name: str, waves: list[np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Values and arrays of one stage; its model is loaded when it is first needed."""
        device, judge = self.job.config.device, self.job.judges.get(name, "")
        if name == "fingerprint":
            return {"values": [fingerprint(wave_S) for wave_S in waves]}, {}
        if name == "quality":
            model = _quality(judge.split()[0], device)
            return {"values": [round(model.score(wave_S)["overall"], 4) for wave_S in waves]}, {}
        if name == "sound_model":
            sounds = _sounds(self.job.config.sound_model, self.job.config.sound_labels, device)
            return {"values": [round(sounds.probability(wave_S), 4) for wave_S in waves]}, {}
        if name == "speaker_model":
            encoder = _encoder(self.job.config.speaker_model, device)
            return {}, {"embeddings": np.stack([encoder.embed(wave_S) for wave_S in waves]).astype(np.float16)}
        recogniser = _recogniser(getattr(self.job.config, name), device)
        texts, languages = recogniser.transcribe(waves, self.job.config.spoken), list[tuple[str, float]]()
        if name == "asr" and self.job.config.language and isinstance(recogniser, LanguageDetector):
            languages = [(code, round(share, 4)) for code, share in recogniser.detect_language(waves)]
        return {"texts": texts, "languages": languages, "ctc": isinstance(recogniser, CtcAligner)}, {}


@lru_cache(maxsize=2)
def _recogniser(given: str, device: str) -> Recogniser:
    from higgs_tune.preprocess.judges.load import load_recogniser

    return load_recogniser(given, device)


@lru_cache(maxsize=1)
def _encoder(given: str, device: str) -> SpeakerEncoder:
    from higgs_tune.preprocess.judges.load import load_speaker_encoder

    return load_speaker_encoder(given, device)


@lru_cache(maxsize=1)
def _quality(given: str, device: str) -> QualityModel:
    from higgs_tune.preprocess.judges.load import load_quality_model

    return load_quality_model(given, device, quick=True)


@lru_cache(maxsize=1)
def _sounds(given: str, labels: tuple[str, ...], device: str) -> SoundModel:
    from higgs_tune.preprocess.judges.load import load_sound_model

    return load_sound_model(given, labels, device)
