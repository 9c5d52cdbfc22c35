"""Words in the codes of a codec, and short recordings of the same voices: what `compose.py` makes sentences of.

    python examples/miniature/coded_words.py --audio_tokenizer_path runs/miniature/codec/native \\
        --out runs/miniature/words --voices slt rms awb

Every word is spoken alone by flite or espeak-ng and encoded a few times, each time shifted by a part of a frame.

Out: `OUT/words.safetensors`, for each voice the codes [K, sum of T] of its words and the words' frames;
`OUT/words.json`, the words in that order; `OUT/references.jsonl` and `OUT/clips`, the recordings (FLAC, 16 kHz) that
serve as references: `{"audio", "text", "voice", "language"}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile
import tyro
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.shards.durable import write_bytes
from safetensors.numpy import load_file, save
from sentences import ONES, TENS, arabic_words, make_sentence, without_marks
from speech import SAMPLE_RATE_HZ, language_of, speak, split_of

# written words and how they are given to the synthesiser
WORDS = {
    "en": {word: word for word in (*ONES, *TENS, "hundred", "and")},
    "ar": {without_marks(word): word for word in reversed(arabic_words())},  # the first of two forms stays
}
PAUSE = ","
MARGIN_S, PAUSE_S = 0.04, 0.2


@dataclass(frozen=True)
class CodedWords:
    """Encode words."""

    audio_tokenizer_path: Path
    """Codec."""
    out: Path
    """Output folder."""
    voices: tuple[str, ...]
    """Voices, of `speech.py`."""
    takes: int = 1
    """Times that a word is encoded."""
    references: int = 40
    """Recordings of each voice."""
    longest_reference: int = 3
    """Most words of a recording."""
    seed: int = 0
    """Seed of the recordings' texts."""


def spoken_word(word: str, voice: str) -> np.ndarray:
    """A word at 16 kHz, without the silence around it, but for a margin."""
    wave_S = speak(word, voice)
    loud = np.flatnonzero(np.abs(wave_S) > 0.01)
    margin = int(MARGIN_S * SAMPLE_RATE_HZ)
    return wave_S[max(0, loud[0] - margin) : loud[-1] + margin]


def encode_words(codec: HiggsCodec, voice: str, takes: int) -> dict[str, list[np.ndarray]]:
    """Codes [K, T] of every word of a voice and of the pause, take by take."""
    rate, hop, coded = codec.config.sample_rate_hz, codec.config.hop_length, {}
    for word, spoken in {**WORDS[language_of(voice)], PAUSE: ""}.items():
        wave_S = spoken_word(spoken, voice) if spoken else np.zeros(int(PAUSE_S * SAMPLE_RATE_HZ), np.float32)
        wave_S = resample_soxr(wave_S, SAMPLE_RATE_HZ, rate)
        coded[word] = [codec.encode(np.pad(wave_S, (take * hop // takes, 0))) for take in range(takes)]
    return coded


def write_references(config: CodedWords, voice: str) -> Iterator[dict[str, Any]]:
    """Recordings of a voice, in its own pronunciation of whole phrases."""
    language, rng = language_of(voice), Random(f"{config.seed} {voice}")
    for number in range(config.references):
        while True:
            spoken = make_sentence(language, ("numbers", "digits"), rng)
            text = without_marks(spoken)
            if len(parts_of(text)) <= config.longest_reference and split_of(text) == "train":
                break
        audio = f"clips/{voice}-{number:02d}.flac"
        soundfile.write(config.out / audio, speak(spoken, voice), SAMPLE_RATE_HZ, format="FLAC")
        yield {"audio": audio, "text": text, "voice": voice, "language": language}


def parts_of(text: str) -> list[str]:
    """Words and pauses of a sentence."""
    return text.replace("،", PAUSE).replace(PAUSE, f" {PAUSE}").split()


def read_words(folder: Path, voice: str, takes: int) -> dict[str, list[np.ndarray]]:
    """What `encode_words` gave, in `takes` of its takes."""
    words, stored = json.loads((folder / "words.json").read_text())[voice], load_file(folder / "words.safetensors")
    parts = np.split(stored[f"{voice} codes"].astype(np.uint16), np.cumsum(stored[f"{voice} frames"])[:-1], axis=1)
    each = len(parts) // len(words)
    return {word: parts[each * number :][: min(each, takes)] for number, word in enumerate(words)}


def main() -> None:
    config = tyro.cli(CodedWords)
    (config.out / "clips").mkdir(parents=True, exist_ok=True)
    codec, stored, words = load_codec(config.audio_tokenizer_path), dict[str, np.ndarray](), dict[str, list[str]]()
    references = list[dict[str, Any]]()
    for voice in config.voices:
        coded = encode_words(codec, voice, config.takes)
        parts = [codes_KT for takes in coded.values() for codes_KT in takes]
        stored[f"{voice} codes"] = np.concatenate(parts, axis=1).astype(np.int16)
        stored[f"{voice} frames"] = np.array([part.shape[1] for part in parts], np.int32)
        words[voice] = list(coded)
        references += write_references(config, voice)
    write_bytes(config.out / "words.safetensors", save(stored))
    write_bytes(config.out / "words.json", json.dumps(words, ensure_ascii=False).encode() + b"\n")
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in references)
    write_bytes(config.out / "references.jsonl", lines.encode())
    print(f"{sum(map(len, words.values()))} words and {len(references)} recordings in {config.out}")


if __name__ == "__main__":
    main()
