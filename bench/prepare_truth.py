"""Make long recordings with known truth, for `bench/prepare_score.py`: what is said where, by whom, and what is wrong.

    python bench/prepare_truth.py --out runs/truth [--minutes 30] [--voices FOLDER] [--seed 0]

Speech is flite's and espeak-ng's, and, with `--voices`, that of real recordings (`NAME.wav` beside `NAME.txt`).
OUT/recordings: an audiobook with `.srt` (wrong, missing and swapped sentences), another with a plain `.txt`, an
interview of two speakers in turns with `.vtt`, a broadcast with a music bed and Whisper's JSON, a damaged recording
(noise, clipped parts) with CTM, a speaker in another language, voice messages without transcripts. Some clips come
again, in other recordings, formats and levels. OUT/truth.json: for each recording its sentences, with `runs`: the
stretches of sound between pauses of 80 ms and more, in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile
import soxr
import tyro
from models.recordings import RATE_HZ, Recording, Spoken, add_fault, pink, speak, trimmed
from models.sentences import GERMAN, make_sentence


@dataclass(frozen=True)
class Options:
    """Make recordings with known truth."""

    out: Path
    """Folder that receives `recordings` and `truth.json`."""
    minutes: float = 30.0
    """Length of all recordings together, about."""
    voices: Path | None = None
    """Folder of real recordings (NAME.wav, NAME.txt)."""
    seed: int = 0
    """Seed of sentences, pauses and faults."""


def store(recording: Recording, wave_S: np.ndarray, folder: Path, suffix: str, rate_hz: int, channels: int = 1) -> Path:
    """Write a recording; a second channel is a quieter copy."""
    path = folder / f"{recording.name}{suffix}"
    wave_S = soxr.resample(wave_S.clip(-1, 1), RATE_HZ, rate_hz).clip(-1, 1)
    wave_SC = np.stack([wave_S * gain for gain in (1.0, 0.8)[:channels]], axis=1)
    with soundfile.SoundFile(path, "w", rate_hz, channels) as file:
        for start in range(0, len(wave_SC), rate_hz):  # libsndfile's Vorbis encoder overflows the stack on long writes
            file.write(wave_SC[start : start + rate_hz])
    return path


def clock(seconds: float, mark: str) -> str:
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


def write_transcript(recording: Recording, path: Path, kind: str) -> None:
    """Write a recording's transcript: srt, vtt, txt, json (Whisper's) or ctm."""
    given = [(s.start, s.end, s.given) for s in recording.sentences if s.given]
    if kind in ("srt", "vtt"):
        mark = "," if kind == "srt" else "."
        cues = [f"{clock(a, mark)} --> {clock(b, mark)}\n{text}\n" for a, b, text in given]
        cues = [f"{at}\n{cue}" for at, cue in enumerate(cues, 1)] if kind == "srt" else ["WEBVTT\n", *cues]
        text = "\n".join(cues)
    elif kind == "txt":
        text = " ".join(text for _, _, text in given) + "\n"
    elif kind == "json":
        segments = [{"id": at, "start": a, "end": b, "text": f" {text}", "words": list(words(a, b, text))}
                    for at, (a, b, text) in enumerate(given)]  # fmt: skip
        text = json.dumps({"text": "".join(s["text"] for s in segments), "segments": segments, "language": "en"})
    else:
        rows = (f"{path.stem} 1 {w['start']:.2f} {w['end'] - w['start']:.2f} {w['word'].strip()}"
                for a, b, text in given for w in words(a, b, text))  # fmt: skip
        text = "\n".join(rows) + "\n"
    path.with_suffix(f".{kind}").write_text(text, encoding="utf-8")


def words(start: float, end: float, text: str) -> Iterator[dict[str, Any]]:
    """Words with times by their share of the characters, as a rough aligner gives them."""
    at, each = start, (end - start) / max(1, len(text.replace(" ", "")))
    for word in text.split():
        until = min(end, at + each * len(word))
        yield {"word": f" {word}", "start": round(at, 2), "end": round(until, 2), "probability": 0.9}
        at = until


def spoken_by(voices: Sequence[str], rng: Random, said: set[str]) -> Iterator[Spoken]:
    """New sentences, by the voices in turns."""
    while True:
        for voice in voices:
            yield speak(voice, rng.choice(GERMAN) if voice == "german" else make_sentence(rng, said))


def real_speech(folder: Path) -> Iterator[Spoken]:
    """The real recordings with a transcript in English, by name."""
    for path in sorted(folder.glob("*.wav")):
        text = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        if text.isascii():
            wave_SC, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
            yield Spoken(path.stem, text, trimmed(wave_SC.mean(axis=1), rate_hz))


def finish(
    recording: Recording,
    wave_S: np.ndarray,
    folder: Path,
    form: tuple[Any, ...],
    transcript: str,
    *,
    faulty: bool = True,
) -> tuple[Path, Recording]:
    """Store a recording and its transcript. form: as `store` takes it; transcript: its format, or empty for none."""
    path = store(recording, wave_S, folder, *form)
    if transcript:
        recording.give_transcript(faulty=faulty)
        write_transcript(recording, path, transcript)
    return path, recording


def books(rng: Random, minute: float, said: set[str], folder: Path) -> Iterator[tuple[Path, Recording]]:
    """Two audiobooks and an interview, which share a jingle and a clip."""
    by = {name: spoken_by([name], rng, said) for name in ("slt", "rms")}
    book = Recording("audiobook one", rng)
    jingle = speak("slt", "You are listening to the stories of the long river, read for you by a machine.")
    first_jingle = book.isolated(jingle)
    book.talk(7 * minute, by["slt"])
    loved = next(spoken for spoken in by["slt"] if len(spoken.wave_S) > 3.5 * RATE_HZ)
    first_loved = book.isolated(loved)
    book.talk(minute, by["slt"])
    book.isolated(loved, first_loved.id, 0.5)  # the same clip again, 6 dB down
    yield finish(book, book.wave(), folder, (".wav", RATE_HZ), "srt")

    second = Recording("كتاب two", rng)
    second.isolated(jingle, first_jingle.id)
    second.talk(5 * minute, by["rms"])
    yield finish(second, second.wave(), folder, (".mp3", 44_100), "txt")

    interview = Recording("interview", rng)
    interview.isolated(jingle, first_jingle.id, 0.7)
    interview.talk(6 * minute, spoken_by(["awb", "slt"], rng, said))
    interview.isolated(loved, first_loved.id)
    yield finish(interview, interview.wave(), folder, (".flac", 48_000, 2), "vtt")


def faulty_sound(rng: Random, minute: float, said: set[str], folder: Path) -> Iterator[tuple[Path, Recording]]:
    """Music under a third of a broadcast; noise over a quarter of a recording, and a quarter of it clipped."""
    broadcast = Recording("broadcast", rng)
    broadcast.talk(3.5 * minute, spoken_by(["kal"], rng, said))
    wave_S, count = broadcast.wave(), len(broadcast.sentences)
    add_fault(broadcast, wave_S, 0, count // 3, "music", 0.03)
    yield finish(broadcast, wave_S, folder, (".ogg", RATE_HZ), "json")

    damaged = Recording("damaged", rng)
    damaged.talk(3 * minute, spoken_by(["rms"], rng, said))
    wave_S, count = damaged.wave(), len(damaged.sentences)
    wave_S += 0.0004 * pink(np.random.default_rng(0), len(wave_S))
    add_fault(damaged, wave_S, 0, count // 4, "noise", 0.06)
    add_fault(damaged, wave_S, count // 2, count // 4, "clipping", 20.0)
    yield finish(damaged, wave_S, folder, (".wav", 16_000), "ctm", faulty=False)


def without_transcripts(rng: Random, minute: float, said: set[str], folder: Path) -> Iterator[tuple[Path, Recording]]:
    """A speaker of German, and four voice messages."""
    foreign = Recording("foreign", rng)
    foreign.talk(min(minute, 40), spoken_by(["german"], rng, said))
    yield finish(foreign, foreign.wave(), folder, (".wav", 22_050), "")
    for number in range(4):
        message = Recording(f"message {number}", rng)
        message.talk(minute * 0.7, spoken_by(["fay" if number % 2 else "awb"], rng, said))
        yield finish(message, message.wave(), folder, (".ogg", 16_000), "")


def make_recordings(options: Options, folder: Path) -> Iterator[tuple[Path, Recording]]:
    """Each recording, stored."""
    rng, said, minute = Random(options.seed), set[str](), 60 * options.minutes / 30
    for make in (books, faulty_sound, without_transcripts):
        yield from make(rng, minute, said, folder)
    if options.voices:
        real = Recording("real", rng)
        for spoken in real_speech(options.voices):
            real.isolated(spoken)
        yield finish(real, real.wave(), folder, (".flac", 44_100), "srt", faulty=False)


def make_truth(options: Options) -> dict[str, Any]:
    """Write the recordings and truth.json; returns its content."""
    folder = options.out / "recordings"
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        {"path": str(path.relative_to(options.out)), "seconds": soundfile.info(path).duration, **asdict_of(recording)}
        for path, recording in make_recordings(options, folder)
    ]
    truth = {"seed": options.seed, "recordings": made}
    (options.out / "truth.json").write_text(json.dumps(truth, ensure_ascii=False, indent=1), encoding="utf-8")
    return truth


def asdict_of(recording: Recording) -> dict[str, Any]:
    return {"sentences": [asdict(sentence) for sentence in recording.sentences]}


def main() -> None:
    options = tyro.cli(Options)
    options = replace(options, out=options.out.absolute())
    made = make_truth(options)["recordings"]
    seconds = sum(recording["seconds"] for recording in made)
    print(f"{len(made)} recordings, {seconds / 60:.1f} minutes, {options.out / 'truth.json'}")


if __name__ == "__main__":
    main()
