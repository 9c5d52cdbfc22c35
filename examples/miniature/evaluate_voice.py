"""Does the reference matter? Similarity of speech to its own reference, and to those of other voices.

    python examples/miniature/evaluate_voice.py --data runs/miniature/base-speech/held_out.jsonl \\
        --wavs runs/miniature/base-eval/wavs/base --speaker_model resemblyzer

With `--asr` a recogniser hears the English lines, and errors are counted in digits, as in `evaluate_codec.py`, so that
one that writes "7 3" for "seven three" can judge.

Prints the share of lines whose own reference is nearer than those of the other voices are on average, the share whose
own reference is nearer than every single one of those, and mean similarities.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import tyro
from evaluate_codec import count_errors, error_rates
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ, SpeakerEncoder
from higgs_tune.preprocess.judges.load import load_recogniser, load_speaker_encoder


@dataclass(frozen=True)
class VoiceEvaluation:
    """Compare voices."""

    data: Path
    """List that higgs-eval took, with `speaker` and `ref_audio`."""
    wavs: Path
    """Folder of the spoken lines, ID.wav."""
    speaker_model: str
    """Speaker encoder, as higgs-eval takes it."""
    asr: str | None = None
    """Recogniser, as higgs-eval takes it."""


def read_wave(path: Path) -> np.ndarray:
    """A recording at the judges' rate."""
    samples, rate_hz = soundfile.read(path, dtype="float32")
    return resample_soxr(samples, rate_hz, SAMPLE_RATE_HZ)


def embed(encoder: SpeakerEncoder, paths: list[Path]) -> np.ndarray:
    """Speaker embeddings of length 1: [clips, dimensions]."""
    vectors = np.stack([encoder.embed(read_wave(path)) for path in paths])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    config = tyro.cli(VoiceEvaluation)
    lines = [json.loads(line) for line in config.data.read_text().splitlines()]
    lines = [line for line in lines if (config.wavs / f"{line['id']}.wav").is_file()]
    encoder = load_speaker_encoder(config.speaker_model, "cpu")
    spoken = embed(encoder, [config.wavs / f"{line['id']}.wav" for line in lines])
    references = embed(encoder, [config.data.parent / line["ref_audio"] for line in lines])
    voices = np.array([line["speaker"] for line in lines])
    similarity = spoken @ references.T  # [lines, references]
    own = similarity.diagonal()
    is_other = voices[:, None] != voices
    mean_other = similarity.mean(1, where=is_other)
    nearest_other = similarity.max(1, where=is_other, initial=-1)
    figures = {
        "lines": len(lines),
        "own_above_mean_other": (own > mean_other).mean(),
        "own_above_every_other": (own > nearest_other).mean(),
        "own": own.mean(),
        "mean_other": mean_other.mean(),
        "nearest_other": nearest_other.mean(),
    }
    print(json.dumps({name: round(float(value), 3) for name, value in figures.items()}))
    if config.asr:
        recogniser = load_recogniser(config.asr, "cpu")
        english = [(line["text"], config.wavs / f"{line['id']}.wav") for line in lines if line["language"] == "en"]
        heard = [(text, recogniser.transcribe([read_wave(path)], "en")[0]) for text, path in english]
        print(json.dumps({recogniser.name: error_rates([count_errors(*pair) for pair in heard])}))


if __name__ == "__main__":
    main()
