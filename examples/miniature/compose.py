"""Training shards of sentences composed of coded words, so that there are as many as it takes.

    python examples/miniature/compose.py --model_path runs/miniature/base-untrained --words runs/miniature/words \\
        --audio_tokenizer_path runs/miniature/codec/native --voices slt rms awb --out runs/miniature/base-data

A sentence is the codes of its words (`word_clips.py`, encoded) in a row, with a pause for each comma; the reference is
a phrase of the same voice. Recorded sentences are remembered one by one long before a small model learns to follow a
text; of composed ones no two are alike.

Out: `OUT/shards`, a shard set, by default with both prompt layouts; `OUT/held_out.jsonl`, a list for higgs-eval of
sentences of the split `test`, with references; `OUT/speech.jsonl`, as `speech.py` writes it, of some decoded training
sentences for the recogniser; `OUT/clips`, decoded targets of both lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import soundfile
import tyro
from higgs_tune.preprocess.assemble import set_writer
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.config import Job, PreprocessConfig
from higgs_tune.preprocess.input.chatml import parse_entry, stored_messages, tokenize
from higgs_tune.preprocess.input.layout import Reference, build_conversation, read_conversation
from higgs_tune.preprocess.pipeline import make_job, make_provenance
from higgs_tune.preprocess.text_tokens import cached_tokenizer
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample
from higgs_tune.shards.reader import ShardSet
from sentences import make_sentence, without_marks
from speech import SAMPLE_RATE_HZ, language_of, split_of, write_lines
from word_clips import PAUSE, parts_of

PAUSE_S = 0.2


@dataclass(frozen=True)
class Composition:
    """Compose training data."""

    model_path: Path
    """Base whose tokenizer is used."""
    audio_tokenizer_path: Path
    """Codec."""
    words: Path
    """Folder of `word_clips.py`."""
    word_shards: Path
    """Its recordings, as higgs-preprocess encoded them."""
    out: Path
    """Output folder."""
    voices: tuple[str, ...]
    """Voices of the training samples."""
    held_out_voices: tuple[str, ...] = ()
    """Voices of the list for higgs-eval; by default those of the training samples."""
    samples: int = 12_000
    """Sentences."""
    kinds: tuple[str, ...] = ("words", "digits", "numbers")
    """Kinds of sentences: `words` (words in any order), `few` (of two to five words, which repeat), or those of
    `sentences.py` that have no other words."""
    layouts: tuple[Literal["chat", "serve"], ...] = ("chat", "serve")
    """Prompt layouts, in turn."""
    longest: int = 20
    """Most words and pauses of a sentence."""
    distinct: bool = False
    """Words of a sentence in any order are distinct."""
    most_frames: int = 1000
    """Frames of a word at most; with 2 of them a pack holds many words, so that following them is learned soon."""
    takes: int = 1
    """Takes of each word."""
    word_references: int = 0
    """Compose references of up to so many coded words, instead of recordings."""
    whisper_path: Path | None = None
    """Whisper whose encoder's features --word_shards has (--whisper_features encoder --whisper_roles both): references
    get them. With the layout chat alone."""
    written: int = 0
    """One sample in so many asks for an Arabic sentence and repeats it in writing only, without audio."""
    held_out: int = 20
    """Held-out sentences of each voice in the list for higgs-eval."""
    decoded: int = 0
    """Training sentences that are decoded for the recogniser."""
    seed: int = 0
    """Seed of the sentences."""


@dataclass(frozen=True)
class Spoken:
    """A reference: what is said, its codes [K, T], its Whisper features if they are wanted, and its recording."""

    text: str
    codes_KT: np.ndarray
    features: tuple[np.ndarray, ...] = ()
    path: Path = Path()


@dataclass(frozen=True)
class Voice:
    """Codes [K, T] of a voice's words, take by take, and its recordings."""

    words: dict[str, list[np.ndarray]]
    references: list[Spoken]


def read_voices(config: Composition, codec: HiggsCodec) -> dict[str, Voice]:
    """The voices, from the encoded recordings."""
    pause_KT = codec.encode(np.zeros(int(PAUSE_S * codec.config.sample_rate_hz), np.float32))
    names = dict.fromkeys((*config.voices, *config.held_out_voices))
    voices, shards = {name: Voice({PAUSE: [pause_KT]}, []) for name in names}, ShardSet(config.word_shards)
    for row in range(len(shards)):
        sample = shards.read(row, mels=config.whisper_path is not None)
        voice, said = voices.get(sample.meta["speaker"]), read_conversation(sample.meta["messages"])
        if voice is None or said is None:
            continue
        source = Path(sample.meta["segments"][-1]["source"])
        if source.parts[0] == "words":
            takes = voice.words.setdefault(said.text, [])
            takes += [sample.codes_KT[:, : config.most_frames]] if len(takes) < config.takes else []
        elif not config.word_references:
            voice.references.append(Spoken(said.text, sample.codes_KT, sample.mels, config.words / source))
    return voices


def draw_text(config: Composition, rng: Random, voice: Voice, name: str, split: str, longest: int) -> str:
    """A sentence of a split, of at most `longest` words and pauses. Single words are of the split `train`."""
    words = [word for word in voice.words if word != PAUSE]
    while True:
        kind, count = rng.choice(config.kinds), rng.randint(1, longest)
        if kind in ("words", "few"):
            known = rng.sample(words, rng.randint(2, 5)) if kind == "few" else words
            text = " ".join(
                rng.sample(known, min(count, len(known))) if config.distinct else rng.choices(known, k=count)
            )
        else:
            text = without_marks(make_sentence(language_of(name), (kind,), rng))
        length = len(parts_of(text))
        if length <= longest and ("train" if length == 1 else split_of(text)) == split:
            return text


def arabic_text(rng: Random) -> str:
    """An Arabic sentence of digits or numbers of the split `train`."""
    while split_of(text := without_marks(make_sentence("ar", ("digits", "numbers"), rng))) != "train":
        pass
    return text


def say(voice: Voice, text: str, rng: Random) -> np.ndarray:
    """Codes [K, T] of a composed sentence; each word in a random take."""
    return np.concatenate([rng.choice(voice.words[part]) for part in parts_of(text)], axis=1)


def compose_one(
    config: Composition, voices: dict[str, Voice], number: int
) -> tuple[dict[str, Any], tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """A sample's ChatML, its codes, of reference and target, if it has audio, and the reference's Whisper features;
    voices and layouts in turn."""
    rng, name = Random(f"{config.seed} {number}"), config.voices[number % len(config.voices)]
    voice, written = voices[name], config.written and rng.randrange(config.written) == 0
    text = arabic_text(rng) if written else draw_text(config, rng, voice, name, "train", config.longest)
    if config.word_references:
        said = draw_text(config, rng, voice, name, "train", config.word_references)
        reference = Spoken(said, say(voice, said, rng))
    else:
        reference = rng.choice(voice.references)
    audio = [{"type": "audio", "audio_url": f"composed/{name}-{number}-{side}"} for side in ("target", "reference")]
    layout = "chat" if written else config.layouts[number // len(config.voices) % len(config.layouts)]
    conversation = build_conversation(layout, text, audio[0], [Reference(audio[1], reference.text)])
    if written:
        conversation["messages"][-1]["content"] = text
    misc = {"language": "ar" if written else language_of(name), "said": [reference.text, text]}
    entry = {"id": f"{name}-{number:06d}", **conversation, "speaker": name, "misc": misc}
    target = () if written else (say(voice, text, rng),)
    return entry, (reference.codes_KT, *target), reference.features


def compose_samples(config: Composition, job: Job, voices: dict[str, Voice]) -> Iterator[Sample]:
    """The samples."""
    ids = set_writer(job).ids
    tokenizer = cached_tokenizer(job.model, ids)
    for number in range(config.samples):
        entry, codes, features = compose_one(config, voices, number)
        chat = parse_entry(entry, number, job.audio_paths, replace(job.texts, tokens=None))
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
        if features:
            segments[0]["mel_frames"] = features[0].shape[1]
        meta = {"messages": stored_messages(chat), "start_index": chat.chat.start_index, "speaker": chat.chat.speaker,
                "misc": chat.chat.misc, "segments": segments}  # fmt: skip
        codes_KT = np.concatenate(codes, axis=1).astype(np.uint16)
        yield Sample(chat.key, meta, tokenize(chat, tokenizer, ids), codes_KT, features)


def write_decoded(config: Composition, codec: HiggsCodec, name: str, codes_KT: np.ndarray) -> tuple[str, float]:
    """Decode to `OUT/clips`; returns the file's name in OUT and its seconds."""
    wave_S = resample_soxr(codec.decode(codes_KT), codec.config.sample_rate_hz, SAMPLE_RATE_HZ)
    soundfile.write(config.out / "clips" / f"{name}.flac", wave_S, SAMPLE_RATE_HZ, format="FLAC")
    return f"clips/{name}.flac", round(len(wave_S) / SAMPLE_RATE_HZ, 3)


def held_out_lines(config: Composition, codec: HiggsCodec, voices: dict[str, Voice]) -> Iterator[dict[str, Any]]:
    """Lines for higgs-eval: the reference is a recording, the target is decoded."""
    rng = Random(config.seed + 2)
    for name in config.held_out_voices or config.voices:
        voice = voices[name]
        for number in range(config.held_out if voice.references else 0):
            text = draw_text(config, rng, voice, name, "test", config.longest)
            reference = voice.references[number % len(voice.references)]
            audio, _seconds = write_decoded(config, codec, f"{name}-{number:03d}", say(voice, text, rng))
            heard = {"ref_text": reference.text, "ref_audio": str(reference.path.resolve())}
            yield {"id": f"{name}-{number:03d}", "text": text, "language": language_of(name), "speaker": name,
                   **heard, "target_audio": audio}  # fmt: skip


def decoded_lines(config: Composition, codec: HiggsCodec, voices: dict[str, Voice]) -> Iterator[dict[str, Any]]:
    """Lines of decoded training sentences, as `speech.py` writes them."""
    rng = Random(config.seed + 3)
    for number in range(config.decoded):
        name = config.voices[number % len(config.voices)]
        text = draw_text(config, rng, voices[name], name, "train", 12)
        audio, seconds = write_decoded(config, codec, f"{name}-decoded-{number:05d}", say(voices[name], text, rng))
        yield {"audio": audio, "text": text, "voice": name, "language": language_of(name),
               "seconds": seconds, "split": "train"}  # fmt: skip


def main() -> None:
    config = tyro.cli(Composition)
    (config.out / "clips").mkdir(parents=True, exist_ok=True)
    codec = load_codec(config.audio_tokenizer_path)
    voices = read_voices(config, codec)
    chatml = config.out / "chatml.jsonl"
    write_lines(chatml, (compose_one(config, voices, number)[0] for number in range(config.samples)))
    options = PreprocessConfig(
        data=chatml,
        out=str(config.out / "shards"),
        model_path=config.model_path,
        audio_tokenizer_path=config.audio_tokenizer_path,
        val_fraction=0.01,
        whisper_features="encoder" if config.whisper_path else "none",
        whisper_path=config.whisper_path,
    )
    job = make_job(options)
    writer = set_writer(job)
    writer.begin()
    writer.write(0, compose_samples(config, job, voices), [])
    totals = writer.finish(1, make_provenance(job))["totals"]
    write_lines(config.out / "held_out.jsonl", held_out_lines(config, codec, voices))
    write_lines(config.out / "speech.jsonl", decoded_lines(config, codec, voices))
    print(f"{totals['samples']} samples, {totals['seconds'] / 3600:.2f} hours in {config.out / 'shards'}")


if __name__ == "__main__":
    main()
