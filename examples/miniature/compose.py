"""Training shards of the base: sentences composed of coded words, so that there are as many as it takes.

    python examples/miniature/compose.py --model_path runs/miniature/base-untrained \\
        --audio_tokenizer_path runs/miniature/codec/native --out runs/miniature/base-data

Every word is spoken alone by flite and encoded a few times, each time shifted by a part of a frame; a sentence is its
words' codes in a row, with a pause for each comma. Recorded sentences are remembered one by one long before a small
model learns to follow a text; of composed ones no two are alike.

Out: `OUT/shards`, a shard set with both prompt layouts; `OUT/held_out.jsonl`, a list for higgs-eval of sentences of the
split `test`, with references; `OUT/speech.jsonl`, as `speech.py` writes it, of some decoded training sentences for the
recogniser; `OUT/clips`, the audio of both lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile
import tyro
from higgs_tune.preprocess.assemble import set_writer
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.config import Job, PreprocessConfig
from higgs_tune.preprocess.input.chatml import parse_entry, stored_messages, tokenize
from higgs_tune.preprocess.input.layout import Reference, build_conversation
from higgs_tune.preprocess.pipeline import make_job, make_provenance
from higgs_tune.preprocess.text_tokens import cached_tokenizer
from higgs_tune.shards.durable import write_bytes
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample
from sentences import ONES, TENS, make_sentence
from speech import SAMPLE_RATE_HZ, speak, split_of

WORDS = (*ONES, *TENS, "hundred", "and")
PAUSE = ","
MARGIN_S, PAUSE_S = 0.04, 0.2


@dataclass(frozen=True)
class Composition:
    """Compose the base's training data."""

    model_path: Path
    """Base whose tokenizer is used."""
    audio_tokenizer_path: Path
    """Codec."""
    out: Path
    """Output folder."""
    samples: int = 12_000
    """Sentences."""
    voices: tuple[str, ...] = ("slt", "rms")
    """Voices of flite."""
    kinds: tuple[str, ...] = ("digits", "numbers")
    """Kinds of sentences, of these words alone."""
    takes: int = 6
    """Times that a word is encoded."""
    held_out: int = 20
    """Held-out sentences of each voice in the list for higgs-eval."""
    decoded: int = 240
    """Training sentences that are decoded for the recogniser."""
    seed: int = 0
    """Seed of the sentences."""


@dataclass(frozen=True)
class Word:
    """A word's waveform [S] at 24 kHz, and its codes [K, T], take by take."""

    wave_S: np.ndarray
    takes: list[np.ndarray]


def spoken_word(word: str, voice: str) -> np.ndarray:
    """A word at 16 kHz, without the silence around it, but for a margin."""
    wave_S = speak(word, voice)
    loud = np.flatnonzero(np.abs(wave_S) > 0.01)
    margin = int(MARGIN_S * SAMPLE_RATE_HZ)
    return wave_S[max(0, loud[0] - margin) : loud[-1] + margin]


def say_words(codec: HiggsCodec, config: Composition, voice: str) -> dict[str, Word]:
    """Every word of a voice, and the pause."""
    rate, hop, words = codec.config.sample_rate_hz, codec.config.hop_length, {}
    for word in (*WORDS, PAUSE):
        wave_S = np.zeros(int(PAUSE_S * SAMPLE_RATE_HZ), np.float32) if word == PAUSE else spoken_word(word, voice)
        wave_S = resample_soxr(wave_S, SAMPLE_RATE_HZ, rate)
        takes = [np.pad(wave_S, (take * hop // config.takes, 0)) for take in range(config.takes)]
        words[word] = Word(wave_S, [codec.encode(wave) for wave in takes])
    return words


def parts_of(text: str) -> list[str]:
    """Words and pauses of a sentence."""
    return text.replace(PAUSE, f" {PAUSE}").split()


def draw_text(config: Composition, rng: Random, split: str, longest: int) -> str:
    """A sentence of a split, of at most `longest` words and pauses."""
    while True:
        text = make_sentence("en", config.kinds, rng)
        if split_of(text) == split and len(parts_of(text)) <= longest:
            return text


def entries(config: Composition) -> Iterator[dict[str, Any]]:
    """The samples' ChatML: voices and layouts in turn."""
    rng = Random(config.seed)
    for number in range(config.samples):
        voice = config.voices[number % len(config.voices)]
        text, other = draw_text(config, rng, "train", 20), draw_text(config, rng, "train", 3)
        audio = [
            {"type": "audio", "audio_url": f"composed/{voice}-{number}-{side}"} for side in ("target", "reference")
        ]
        layout = "serve" if number // len(config.voices) % 2 else "chat"
        conversation = build_conversation(layout, text, audio[0], [Reference(audio[1], other)])
        conversation.pop("start_index", None)
        yield {"id": f"{voice}-{number:06d}", **conversation, "speaker": voice,
               "misc": {"language": "en", "said": [other, text]}}  # fmt: skip


def compose_samples(config: Composition, job: Job, words: dict[str, dict[str, Word]]) -> Iterator[Sample]:
    """The samples; each word in a random take."""
    rng, ids = Random(config.seed + 1), set_writer(job).ids
    tokenizer = cached_tokenizer(job.model, ids)
    for position, entry in enumerate(entries(config)):
        chat = parse_entry(entry, position, job.audio_paths, replace(job.texts, tokens=None))
        said = entry["misc"]["said"]
        codes = [
            np.concatenate([rng.choice(words[entry["speaker"]][part].takes) for part in parts_of(text)], axis=1)
            for text in said
        ]
        segments = [
            {
                "role": role,
                "frames": codes_KT.shape[1],
                "seconds": codes_KT.shape[1] / FRAME_RATE_HZ,
                "source": clip.source,
                "sha256": hashlib.sha256(codes_KT.tobytes()).hexdigest(),
            }
            for role, clip, codes_KT in zip(chat.roles, chat.clips, codes, strict=True)
        ]
        meta = {"messages": stored_messages(chat), "start_index": chat.chat.start_index, "speaker": chat.chat.speaker,
                "misc": chat.chat.misc, "segments": segments}  # fmt: skip
        yield Sample(chat.key, meta, tokenize(chat, tokenizer, ids), np.concatenate(codes, axis=1))


def write_held_out(config: Composition, rate_hz: int, words: dict[str, dict[str, Word]]) -> None:
    """The list for higgs-eval, with references and targets joined of the words' waveforms."""
    rng, lines = Random(config.seed + 2), []
    (config.out / "clips").mkdir(exist_ok=True)

    def write_clip(name: str, text: str, voice: str) -> str:
        wave_S = np.concatenate([words[voice][part].wave_S for part in parts_of(text)])
        soundfile.write(config.out / "clips" / f"{name}.flac", wave_S, rate_hz, format="FLAC")
        return f"clips/{name}.flac"

    for voice in config.voices:
        for number in range(config.held_out):
            text, other, name = (
                draw_text(config, rng, "test", 20),
                draw_text(config, rng, "train", 3),
                f"{voice}-{number:03d}",
            )
            lines.append({"id": name, "text": text, "language": "en", "speaker": voice, "ref_text": other,
                          "ref_audio": write_clip(f"{name}-reference", other, voice),
                          "target_audio": write_clip(name, text, voice)})  # fmt: skip
    write_bytes(config.out / "held_out.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_decoded(config: Composition, codec: HiggsCodec, words: dict[str, dict[str, Word]]) -> None:
    """Decoded training sentences, as a folder of `speech.py`."""
    rng, lines = Random(config.seed + 3), []
    for number in range(config.decoded):
        voice, text = config.voices[number % len(config.voices)], draw_text(config, rng, "train", 12)
        codes_KT = np.concatenate([rng.choice(words[voice][part].takes) for part in parts_of(text)], axis=1)
        wave_S = resample_soxr(codec.decode(codes_KT), codec.config.sample_rate_hz, SAMPLE_RATE_HZ)
        audio = f"clips/{voice}-decoded-{number:05d}.flac"
        soundfile.write(config.out / audio, wave_S, SAMPLE_RATE_HZ, format="FLAC")
        lines.append({"audio": audio, "text": text, "voice": voice, "language": "en",
                      "seconds": round(len(wave_S) / SAMPLE_RATE_HZ, 3), "split": "train"})  # fmt: skip
    write_bytes(config.out / "speech.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def main() -> None:
    config = tyro.cli(Composition)
    config.out.mkdir(parents=True, exist_ok=True)
    chatml = config.out / "chatml.jsonl"
    write_bytes(chatml, "".join(json.dumps(entry) + "\n" for entry in entries(config)).encode())
    options = PreprocessConfig(
        data=chatml,
        out=str(config.out / "shards"),
        model_path=config.model_path,
        audio_tokenizer_path=config.audio_tokenizer_path,
        val_fraction=0.005,
    )
    job, codec = make_job(options), load_codec(config.audio_tokenizer_path)
    words = {voice: say_words(codec, config, voice) for voice in config.voices}
    writer = set_writer(job)
    writer.begin()
    writer.write(0, compose_samples(config, job, words), [])
    totals = writer.finish(1, make_provenance(job))["totals"]
    write_held_out(config, codec.config.sample_rate_hz, words)
    write_decoded(config, codec, words)
    print(f"{totals['samples']} samples, {totals['seconds'] / 3600:.2f} hours in {config.out / 'shards'}")


if __name__ == "__main__":
    main()
