"""Make speech with Debian's flite 2.2 and espeak-ng 1.51: clips, and `speech.jsonl` with what is said in which voice.

    python examples/miniature/speech.py --out runs/miniature/speech --minutes 40 --voices slt rms amal --kinds numbers

The same options give the same clips. Clips are FLAC, mono, 16 kHz. A line of `speech.jsonl`:
`{"audio", "text", "voice", "language", "seconds", "split"}`; one sentence in twenty (by its text, so that a sentence
is never on both sides) is of the split `test`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile
import soxr
import tyro
import xxhash
from higgs_tune.shards.durable import write_bytes
from sentences import make_sentence, without_marks

SAMPLE_RATE_HZ = 16_000
FLITE = {"slt": ("slt",), "rms": ("rms",), "awb": ("awb",), "kal": ("kal16",)}
# espeak-ng's voice, pitch (0-99), speed (words a minute)
ESPEAK = {
    "amal": ("ar+f2", 55, 150),
    "huda": ("ar+f4", 70, 165),
    "karim": ("ar+m3", 40, 155),
    "zayd": ("ar+m7", 25, 140),
    "nour": ("ar+f3", 60, 145),
    "omar": ("ar+m1", 45, 150),
}
SPLITS = 20  # one sentence in so many is held out


@dataclass(frozen=True)
class SpeechConfig:
    """Make speech."""

    out: Path
    """Folder that receives `clips` and `speech.jsonl`."""
    minutes: float
    """Minutes of speech of each voice."""
    voices: tuple[str, ...] = (*FLITE, *ESPEAK)
    """English voices of flite: slt, rms, awb, kal; Arabic ones of espeak-ng: amal, huda, karim, zayd, nour, omar."""
    kinds: tuple[str, ...] = ("digits", "numbers", "time", "date", "general")
    """Kinds of sentences."""
    seed: int = 0
    """Seed of the sentences."""


def language_of(voice: str) -> str:
    """Language of a voice: en or ar."""
    return "en" if voice in FLITE else "ar"


def split_of(text: str) -> str:
    """`test` for one text in twenty, else `train`; vowel marks do not count."""
    return "test" if xxhash.xxh64_intdigest(without_marks(text).encode()) % SPLITS == 0 else "train"


def speak(text: str, voice: str) -> np.ndarray:
    """Speech as float32 [S] at 16 kHz."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        if voice in FLITE:
            command = ["flite", "-voice", *FLITE[voice], "-t", text, "-o", wav.name]
        else:
            name, pitch, speed = ESPEAK[voice]
            command = ["espeak-ng", "-v", name, "-p", str(pitch), "-s", str(speed), "-w", wav.name, text]
        subprocess.run(command, check=True)
        samples, rate_hz = soundfile.read(wav.name, dtype="float32")
    return soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSONL."""
    write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def say_all(config: SpeechConfig, voice: str) -> Iterator[dict[str, Any]]:
    """Clips of one voice until they fill `config.minutes`; each sentence once, while there are new ones."""
    rng, said, seconds, number = Random(f"{config.seed} {voice}"), set[str](), 0.0, 0
    while seconds < 60 * config.minutes:
        text = make_sentence(language_of(voice), config.kinds, rng)
        for _ in range(19):
            if text not in said:
                break
            text = make_sentence(language_of(voice), config.kinds, rng)
        said.add(text)
        samples, audio = speak(text, voice), f"clips/{voice}-{number:05d}.flac"
        soundfile.write(config.out / audio, samples, SAMPLE_RATE_HZ, format="FLAC")
        length = len(samples) / SAMPLE_RATE_HZ
        yield {"audio": audio, "text": text, "voice": voice, "language": language_of(voice),
               "seconds": round(length, 3), "split": split_of(text)}  # fmt: skip
        seconds, number = seconds + length, number + 1


def main() -> None:
    config = tyro.cli(SpeechConfig)
    (config.out / "clips").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        by_voice = list(pool.map(lambda voice: list(say_all(config, voice)), config.voices))
    lines = [line for lines in by_voice for line in lines]
    write_lines(config.out / "speech.jsonl", lines)
    hours = sum(line["seconds"] for line in lines) / 3600
    print(f"{len(lines)} clips, {hours:.2f} hours in {config.out}")


if __name__ == "__main__":
    main()
