"""Make the Arabic example set with espeak-ng (Debian package espeak-ng 1.51): clips, transcripts, chatml.json.

    python examples/arabic/make_examples.py

In: `sentences.txt`, one diacritised sentence a line. Out, beside this file: `clips/VOICE-NN.flac` (mono, 16 kHz),
`transcripts.csv` (audio, text, speaker), and `chatml.json`, where each sample pairs a clip with a different reference
clip of the same voice. The results are committed; run this only to change them.
"""

from __future__ import annotations

import csv
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import soundfile
import soxr

HERE = Path(__file__).parent
# name: espeak-ng voice, pitch (0-99), speed (words a minute)
VOICES = {
    "amal": ("ar+f2", 55, 150),
    "huda": ("ar+f4", 70, 165),
    "karim": ("ar+m3", 40, 155),
    "zayd": ("ar+m7", 25, 140),
}
SAMPLE_RATE_HZ = 16_000
SYSTEM = "Generate audio following instruction."
INSTRUCTION = "Read this text in the same voice: "


def speak(text: str, voice: str, target: Path) -> float:
    """Write one clip as FLAC; return its seconds."""
    name, pitch, speed = VOICES[voice]
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        command = ["espeak-ng", "-v", name, "-p", str(pitch), "-s", str(speed), "-w", wav.name, text]
        subprocess.run(command, check=True)
        samples, rate = soundfile.read(wav.name, dtype="int16")
    samples = soxr.resample(samples, rate, SAMPLE_RATE_HZ)
    soundfile.write(target, samples, SAMPLE_RATE_HZ, format="FLAC")
    return round(len(samples) / SAMPLE_RATE_HZ, 3)


def chatml(target: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """One training sample: speak the target's text in the reference's voice."""
    user = [
        {"type": "text", "text": reference["text"]},
        {"type": "audio", "audio_url": reference["audio"]},
        {"type": "text", "text": INSTRUCTION + target["text"]},
    ]
    answer = [{"type": "text", "text": target["text"]}, {"type": "audio", "audio_url": target["audio"]}]
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer},
        ],
        "speaker": target["speaker"],
        "misc": {"duration": target["duration"]},
    }


def main() -> None:
    sentences = (HERE / "sentences.txt").read_text().split("\n")[:-1]
    (HERE / "clips").mkdir(exist_ok=True)
    clips: list[dict[str, Any]] = []
    for number, text in enumerate(sentences):
        voice = list(VOICES)[number % len(VOICES)]
        audio = f"clips/{voice}-{number // len(VOICES):02d}.flac"
        duration = speak(text, voice, HERE / audio)
        clips.append({"audio": audio, "text": text, "speaker": voice, "duration": duration})
    with (HERE / "transcripts.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["audio", "text", "speaker"], extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(clips)
    step = len(VOICES)  # the next clip of the same voice, around the circle
    samples = [chatml(clip, clips[(i + step) % len(clips)]) for i, clip in enumerate(clips)]
    text = ",\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples)
    (HERE / "chatml.json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
