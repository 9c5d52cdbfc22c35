"""Recordings of single words and of short phrases: what `compose.py` makes sentences of, once they are encoded.

    python examples/miniature/word_clips.py --out runs/miniature/words --voices slt rms awb
    higgs-preprocess --data runs/miniature/words/manifest.jsonl --out runs/miniature/words/shards --ref_drop 1 \\
        --min_seconds 0.1 --model_path MODEL --audio_tokenizer_path CODEC

Every word is spoken alone by flite or espeak-ng, in a few takes that are shifted by a part of a frame. Phrases serve as
references of their voice.

Out: `OUT/manifest.jsonl`, a manifest for higgs-preprocess with text and voice (`speaker`), and `OUT/words` and
`OUT/phrases`, the recordings (FLAC, 16 kHz).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile
import tyro
from higgs_tune.shards.format import FRAME_RATE_HZ
from sentences import ONES, TENS, UNITS_AR, arabic_words, make_sentence, without_marks
from speech import SAMPLE_RATE_HZ, language_of, speak, split_of, write_lines

# written words and how they are given to the synthesiser
WORDS = {
    "en": {word: word for word in (*ONES, *TENS, "hundred", "and")},
    "ar": {without_marks(word): word for word in reversed(arabic_words())},  # the first of two forms stays
}
DIGITS = {*ONES[:10], *map(without_marks, UNITS_AR[:10])}
PAUSE = ","
MARGIN_S = 0.04
FRAME = SAMPLE_RATE_HZ // FRAME_RATE_HZ  # samples of a frame of codes


@dataclass(frozen=True)
class WordClips:
    """Record words."""

    out: Path
    """Output folder."""
    voices: tuple[str, ...]
    """Voices, of `speech.py`."""
    takes: int = 1
    """Takes of each word."""
    digits_only: bool = False
    """Only the words zero to nine, and phrases of them."""
    references: int = 40
    """Phrases of each voice."""
    longest_reference: int = 3
    """Most words of a phrase."""
    unlike: tuple[Path, ...] = ()
    """Folders of this script whose phrases are left out, so that the recordings are ones that nobody has heard."""
    seed: int = 0
    """Seed of the phrases."""


def spoken_word(word: str, voice: str) -> np.ndarray:
    """A word at 16 kHz, without the silence around it, but for a margin."""
    wave_S = speak(word, voice)
    loud = np.flatnonzero(np.abs(wave_S) > 0.01)
    margin = int(MARGIN_S * SAMPLE_RATE_HZ)
    return wave_S[max(0, loud[0] - margin) : loud[-1] + margin]


def clips_of(
    config: WordClips, voice: str, heard: Collection[tuple[str, str]]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, text and samples of each recording of a voice; no phrase is one of those (voice, text) that were heard."""
    language, rng = language_of(voice), Random(f"{config.seed} {voice}")
    for number, (word, spoken) in enumerate(WORDS[language].items()):
        if word in DIGITS or not config.digits_only:
            wave_S = spoken_word(spoken, voice)
            for take in range(config.takes):
                shifted_S = np.pad(wave_S, (take * FRAME // config.takes, 0))
                yield f"words/{voice}-{number:02d}-{take}.flac", word, shifted_S
    kinds = ("digits",) if config.digits_only else ("numbers", "digits")
    for number in range(config.references):
        while True:
            spoken = make_sentence(language, kinds, rng)
            text = without_marks(spoken)
            short = len(parts_of(text)) <= config.longest_reference
            if short and (voice, text) not in heard and split_of(text) == "train":
                break
        yield f"phrases/{voice}-{number:02d}.flac", text, speak(spoken, voice)


def parts_of(text: str) -> list[str]:
    """Words and pauses of a sentence."""
    return text.replace("،", PAUSE).replace(PAUSE, f" {PAUSE}").split()


def main() -> None:
    config = tyro.cli(WordClips)
    manifests = ((folder / "manifest.jsonl").read_text().splitlines() for folder in config.unlike)
    heard = {(line["speaker"], line["text"]) for manifest in manifests for line in map(json.loads, manifest)}
    lines = list[dict[str, Any]]()
    for folder in ("words", "phrases"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    for voice in config.voices:
        for audio, text, wave_S in clips_of(config, voice, heard):
            soundfile.write(config.out / audio, wave_S, SAMPLE_RATE_HZ, format="FLAC")
            lines.append({"audio": audio, "text": text, "speaker": voice})
    write_lines(config.out / "manifest.jsonl", lines)
    print(f"{len(lines)} recordings in {config.out}")


if __name__ == "__main__":
    main()
