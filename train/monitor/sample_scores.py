"""Judges of generated samples: what a recogniser hears, and how near the voice is.

In: the wav files of samples, and the texts that they should say. Out: character errors and similarity of each, and the
figures of all. A sample without sound counts as wrong: all characters deleted, similarity 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from higgs_tune.preprocess.audio.audio import load_clip
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ, Recogniser, SpeakerEncoder, cosine
from higgs_tune.preprocess.judges.load import load_recogniser, load_speaker_encoder
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.preprocess.reject import Reject
from higgs_tune.train.options import ValidationArgs

NORMALISER = "omnivoice"
LONGEST_S = 3600.0


@dataclass(frozen=True)
class SampleJudges:
    """recogniser, encoder: None where it was not asked for. language: for the recogniser; empty: it detects it."""

    recogniser: Recogniser | None
    encoder: SpeakerEncoder | None
    language: str
    _voices: dict[Path, np.ndarray] = field(default_factory=dict, repr=False)  # embeddings of reference clips

    @property
    def about(self) -> str:
        """The judges and the normaliser, as they stand beside every figure."""
        named = [f"{judge.name} {judge.revision}".strip() for judge in (self.recogniser, self.encoder) if judge]
        language = [f"language {self.language}"] if self.language else []
        return "; ".join([*named, *language, f"normaliser {NORMALISER}"])

    def score(self, wav: Path | None, text: str, voice: Path | None) -> dict[str, Any]:
        """What the judges say of one file.

        Args:
            wav: None where nothing was said.
            text: that it should say.
            voice: a recording of the voice that it should have; None: similarity is not measured.
        """
        wave_S = _load(wav)
        scores: dict[str, Any] = {"judges": self.about}
        if self.recogniser:
            heard = "" if wave_S is None else self.recogniser.transcribe([wave_S], self.language)[0].strip()
            apply = normaliser(NORMALISER).apply
            edits = count_edits(apply(text), apply(heard))
            scores |= {"heard": heard, "cer": edits.rate, "character_errors": edits.errors, "characters": edits.length}
        voice_D = self._embed_voice(voice) if voice else None
        if self.encoder and voice_D is not None:
            near = None if wave_S is None else cosine(voice_D, self.encoder.embed(wave_S))
            scores["similarity"] = 0.0 if near is None else near
        return scores

    def _embed_voice(self, voice: Path) -> np.ndarray | None:
        """The embedding of a recording that does not change during a run; None where it has no sound."""
        if self.encoder and voice not in self._voices:
            wave_S = _load(voice)
            if wave_S is not None:
                self._voices[voice] = self.encoder.embed(wave_S)
        return self._voices.get(voice)


def load_judges(options: ValidationArgs, device: torch.device) -> SampleJudges | None:
    """The judges of `--sample_asr` and `--sample_speaker_model`; None where neither is given.

    Raises:
        UserError: a judge cannot be loaded.
    """
    if not (options.sample_asr or options.sample_speaker_model):
        return None
    with torch.random.fork_rng():  # a run is the same with judges and without
        recogniser = load_recogniser(options.sample_asr, str(device)) if options.sample_asr else None
        encoder = (
            load_speaker_encoder(options.sample_speaker_model, str(device)) if options.sample_speaker_model else None
        )
    return SampleJudges(recogniser, encoder, options.sample_language)


def figures(scores: list[dict[str, Any]]) -> dict[str, float]:
    """`cer`: errors of all samples over the characters of all texts; `similarity`: the mean."""
    found: dict[str, float] = {}
    if characters := sum(score.get("characters", 0) for score in scores):
        found["cer"] = sum(score.get("character_errors", 0) for score in scores) / characters
    near = [score["similarity"] for score in scores if "similarity" in score]
    return found | ({"similarity": float(np.mean(near))} if near else {})


def _load(path: Path | None) -> np.ndarray | None:
    """The waveform at the judges' rate; None where there is no sound."""
    if path is None or not path.is_file():
        return None
    try:
        wave = load_clip(Clip(str(path), str(path)), SAMPLE_RATE_HZ, AudioOptions(0.0, LONGEST_S))
    except Reject:  # too short to hold a sample
        return None
    return wave.samples_S if wave.samples_S.any() else None
