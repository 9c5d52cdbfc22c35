"""What a judge is: a recogniser, a speaker encoder or a quality model, behind one small interface each.

Every judge takes mono float32 waveforms at 16 kHz, and names itself with its revision, for the tables.

Shapes: S samples, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

SAMPLE_RATE_HZ = 16_000
SHORTEST_VOICE_S = 0.5  # shorter clips are repeated up to it: speaker encoders look at a wider context than they have
LONGEST_VOICE_S = 60.0  # of a longer clip only the beginning is embedded: attention takes memory by its square


class Judge(Protocol):
    """name: the model; revision: a commit, package version, or hash of the weights; empty where none is known."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...


class Recogniser(Judge, Protocol):
    """Speech to text."""

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        """One transcript a clip, in order; empty where nothing is heard. `language`: a code, or empty to detect."""
        ...


@runtime_checkable
class LanguageDetector(Protocol):
    """A recogniser that tells which language is spoken."""

    def detect_language(self, waves_S: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """The likeliest language of each clip, and its probability."""
        ...


@runtime_checkable
class CtcAligner(Protocol):
    """A recogniser that tells the probability of each symbol at each time (T frames, V symbols)."""

    @property
    def blank(self) -> int: ...
    @property
    def between(self) -> int | None: ...
    def symbols(self, word: str) -> list[int]: ...
    def log_probs(self, waves_S: Sequence[np.ndarray], language: str) -> list[np.ndarray]: ...


class SpeakerEncoder(Judge, Protocol):
    """Speech to a voice."""

    def embed(self, wave_S: np.ndarray) -> np.ndarray:
        """float32 [D]; voices compare by the cosine."""
        ...


class QualityModel(Judge, Protocol):
    """Speech to predicted opinion scores of 1 to 5."""

    def score(self, wave_S: np.ndarray) -> dict[str, float]:
        """Scores by name; `overall` is one of them."""
        ...


class SoundModel(Judge, Protocol):
    """Tells sounds that are not wanted under speech."""

    def probability(self, wave_S: np.ndarray) -> float:
        """How likely such a sound is in the clip, 0 to 1."""
        ...


def voice_part(wave_S: np.ndarray) -> np.ndarray:
    """The part of a clip that speaker encoders embed."""
    times = -(-int(SHORTEST_VOICE_S * SAMPLE_RATE_HZ) // len(wave_S))
    return np.tile(wave_S[: int(LONGEST_VOICE_S * SAMPLE_RATE_HZ)], times)


def cosine(one_D: np.ndarray, two_D: np.ndarray) -> float | None:
    """Cosine of two embeddings; None where one is zero or not finite."""
    norms = float(np.linalg.norm(one_D) * np.linalg.norm(two_D))
    return float(one_D @ two_D) / norms if np.isfinite(norms) and norms > 0 else None
