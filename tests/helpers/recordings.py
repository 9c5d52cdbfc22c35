"""Recordings whose speech is known to the millisecond: bursts of noise, shaped like words, between pauses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16_000
WORDS = ("قال", "الرجل", "إن", "البحر", "كان", "هادئا", "في", "الصباح", "ثم", "هبت", "ريح", "قوية", "من", "الشمال")


@dataclass(frozen=True)
class Sentence:
    """start, end: seconds of its speech in the recording."""

    text: str
    start: float
    end: float


def speak(rng: np.random.Generator, words: int, word_s: float = 0.4) -> np.ndarray:
    """Bursts of coloured noise, a word each, with 30 ms between them."""
    parts = []
    for _ in range(words):
        burst_S = np.convolve(rng.normal(size=int(word_s * RATE_HZ)), rng.normal(size=12), mode="same")
        envelope_S = 0.4 + np.abs(np.sin(np.linspace(0.3, 2.8, len(burst_S))))
        parts += [0.1 * burst_S / np.std(burst_S) * envelope_S, np.zeros(int(0.03 * RATE_HZ))]
    return np.concatenate(parts[:-1])


def make_recording(path: Path, seed: int, sentences: int = 8, rate_hz: int = RATE_HZ) -> list[Sentence]:
    """Write a recording of sentences of 8 to 14 words, pauses of 0.5 to 1.5 s between them; returns the truth."""
    import soxr

    rng = np.random.default_rng(seed)
    parts, truth, at = [np.zeros(RATE_HZ // 2)], list[Sentence](), 0.5
    for number in range(sentences):
        count = int(rng.integers(8, 15))
        spoken_S, pause_s = speak(rng, count), float(rng.uniform(0.5, 1.5))
        words = [f"{WORDS[int(rng.integers(len(WORDS)))]}" for _ in range(count - 1)]
        truth.append(Sentence(" ".join([*words, f"{seed}{number}."]), at, at + len(spoken_S) / RATE_HZ))
        parts += [spoken_S, np.zeros(int(pause_s * RATE_HZ))]
        at += (len(spoken_S) + int(pause_s * RATE_HZ)) / RATE_HZ
    wave_S = np.concatenate(parts)
    wave_S = (wave_S + rng.normal(0, 1e-4, len(wave_S))).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, soxr.resample(wave_S, RATE_HZ, rate_hz), rate_hz)
    return truth


def write_srt(path: Path, truth: list[Sentence]) -> None:
    """The sentences as SubRip cues."""

    def stamp(seconds: float) -> str:
        whole, part = divmod(round(seconds * 1000), 1000)
        return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d},{part:03d}"

    blocks = [f"{number}\n{stamp(one.start)} --> {stamp(one.end)}\n{one.text}\n" for number, one in enumerate(truth, 1)]
    path.write_text("\n".join(blocks), encoding="utf-8")
