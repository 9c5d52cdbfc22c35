"""Recordings that grow sentence by sentence, with what is known of them: synthesised speech, pauses and faults.

Shapes: S samples, W windows.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np
import soundfile
import soxr
from models.sentences import make_sentence

RATE_HZ = 24_000  # of everything until a recording is stored
VOICES = {
    "slt": ["flite", "-voice", "slt"],
    "rms": ["flite", "-voice", "rms"],
    "awb": ["flite", "-voice", "awb"],
    "kal": ["flite", "-voice", "kal16"],
    "fay": ["espeak-ng", "-v", "en-us+f4", "-p", "70", "-s", "150"],
    "german": ["espeak-ng", "-v", "de", "-s", "150"],
}


@dataclass
class Sentence:
    """One sentence where it stands in a recording; times in seconds.

    Attributes:
        given: what the transcript says there; None: nothing.
        kind: right, wrong, missing or swapped, as the transcript has it; or none where there is no transcript.
        copy_of: id of the sentence whose sound this is.
        faults: noise, music, clipping.
    """

    id: str
    voice: str
    text: str
    start: float
    end: float
    runs: list[tuple[float, float]]
    given: str | None = None
    kind: str = "none"
    copy_of: str | None = None
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spoken:
    """A spoken sentence without silence around it: float32 [S] at RATE_HZ."""

    voice: str
    text: str
    wave_S: np.ndarray


def speak(voice: str, text: str) -> Spoken:
    """Let a synthesiser speak."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        flags = ["-t", text, "-o", wav.name] if VOICES[voice][0] == "flite" else ["-w", wav.name, text]
        subprocess.run([*VOICES[voice], *flags], check=True)
        return Spoken(voice, text, trimmed(*soundfile.read(wav.name, dtype="float32")))


def trimmed(wave_S: np.ndarray, rate_hz: int) -> np.ndarray:
    """At RATE_HZ, without silence at the ends, at a common level."""
    wave_S = soxr.resample(wave_S, rate_hz, RATE_HZ)
    runs = sound_runs(wave_S)
    wave_S = wave_S[int(runs[0][0] * RATE_HZ) : int(runs[-1][1] * RATE_HZ)]
    return (wave_S * (0.08 / np.sqrt(np.mean(np.square(wave_S))))).clip(-0.98, 0.98).astype(np.float32)


def sound_runs(wave_S: np.ndarray, gap_s: float = 0.08) -> list[tuple[float, float]]:
    """Stretches of sound, in seconds: 10 ms windows at most 40 dB below the loudest; gaps below `gap_s` are closed."""
    window = RATE_HZ // 100
    power_W = np.square(wave_S[: len(wave_S) // window * window]).reshape(-1, window).mean(axis=1)
    loud_W = np.flatnonzero(power_W > power_W.max() * 1e-4)
    breaks_B = np.flatnonzero(np.diff(loud_W) > gap_s * 100 + 1)
    firsts, lasts = [loud_W[0], *loud_W[breaks_B + 1]], [*loud_W[breaks_B], loud_W[-1]]
    return [(round(a / 100, 3), round((b + 1) / 100, 3)) for a, b in zip(firsts, lasts, strict=True)]


class Recording:
    """A recording as it grows: sentences and pauses, then faults of its sound and of its transcript."""

    def __init__(self, name: str, rng: Random) -> None:
        self.name, self.rng = name, rng
        self.parts: list[np.ndarray] = []
        self.sentences: list[Sentence] = []
        self.length = 0
        self.pause(0.7)

    @property
    def seconds(self) -> float:
        return self.length / RATE_HZ

    def pause(self, seconds: float) -> None:
        self.parts.append(np.zeros(int(seconds * RATE_HZ), np.float32))
        self.length += len(self.parts[-1])

    def say(self, spoken: Spoken, copy_of: str | None = None, gain: float = 1.0) -> Sentence:
        """Add a sentence and no pause."""
        start, wave_S = self.seconds, spoken.wave_S * np.float32(gain)
        runs = [(round(start + a, 3), round(start + b, 3)) for a, b in sound_runs(spoken.wave_S)]
        end = round(start + len(wave_S) / RATE_HZ, 3)
        sentence = Sentence(
            f"{self.name}:{len(self.sentences)}", spoken.voice, spoken.text, round(start, 3), end, runs, copy_of=copy_of
        )
        self.parts.append(wave_S)
        self.length += len(wave_S)
        self.sentences.append(sentence)
        return sentence

    def isolated(self, spoken: Spoken, copy_of: str | None = None, gain: float = 1.0) -> Sentence:
        """Add a sentence between pauses that every cutter cuts in."""
        self.pause(2.5)
        sentence = self.say(spoken, copy_of, gain)
        self.pause(2.5)
        return sentence

    def talk(self, seconds: float, spoken: Iterator[Spoken]) -> None:
        """Sentences with pauses of 0.1 to 3 s, most of them short, for about so long."""
        end = self.seconds + seconds
        while self.seconds < end:
            self.say(next(spoken))
            self.pause(self.rng.choice((0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.3, 2.0, 3.0)))

    def wave(self) -> np.ndarray:
        return np.concatenate(self.parts)

    def give_transcript(self, *, faulty: bool) -> None:
        """Right texts; if `faulty`, a tenth of them wrong, a fifteenth missing, a tenth swapped in pairs."""
        for sentence in self.sentences:
            sentence.given, sentence.kind = sentence.text, "right"
        if not faulty:
            return
        pairs = range(len(self.sentences) - 1)
        numbers = self.rng.sample(pairs, min(len(pairs), max(3, len(self.sentences) // 5)))
        said = set[str]()
        for at, number in enumerate(numbers):
            one, two = self.sentences[number : number + 2]
            if one.kind != "right" or two.kind != "right":
                continue
            if at % 3 == 0:
                one.given, one.kind = make_sentence(self.rng, said), "wrong"
            elif at % 3 == 1:
                one.given, one.kind = None, "missing"
            else:
                one.given, two.given, one.kind, two.kind = two.text, one.text, "swapped", "swapped"


def pink(rng: np.random.Generator, length: int) -> np.ndarray:
    """Noise whose power falls by 3 dB an octave; RMS 1."""
    spectrum_F = np.fft.rfft(rng.standard_normal(length))
    wave_S = np.fft.irfft(spectrum_F / np.sqrt(np.arange(1, len(spectrum_F) + 1)), length)
    return (wave_S / wave_S.std()).astype(np.float32)


def music(rng: Random, length: int) -> np.ndarray:
    """Chords of four notes with overtones, one every 0.8 s; RMS 1."""
    times_S = np.arange(int(0.8 * RATE_HZ)) / RATE_HZ
    chords: list[np.ndarray] = []
    while len(chords) * len(times_S) < length:
        root = rng.choice((131.0, 147.0, 175.0, 196.0))
        notes = (root * ratio * overtone for ratio in (1, 1.25, 1.5, 2) for overtone in (1, 2, 3))
        chords.append(sum(np.sin(2 * np.pi * f * times_S) / (f / root) for f in notes) * np.exp(-2 * times_S))
    wave_S = np.concatenate(chords)[:length]
    return (wave_S / wave_S.std()).astype(np.float32)


def add_fault(recording: Recording, wave_S: np.ndarray, first: int, count: int, kind: str, level: float) -> None:
    """Spoil the sound under `count` sentences, in place, and note it.

    Args:
        kind: noise and music are added at an RMS of `level`; clipping multiplies by it.
    """
    spoiled = recording.sentences[first : first + count]
    if not spoiled:
        return
    begin, end = (int(t * RATE_HZ) for t in (max(0.0, spoiled[0].start - 0.05), spoiled[-1].end + 0.05))
    if kind == "clipping":
        wave_S[begin:end] *= level
    else:
        seed = recording.rng.randrange(1 << 30)
        made = pink(np.random.default_rng(seed), end - begin) if kind == "noise" else music(recording.rng, end - begin)
        wave_S[begin:end] += level * made[: end - begin]
    for sentence in spoiled:
        sentence.faults.append(kind)
