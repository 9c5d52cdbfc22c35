"""Does the reference matter? Similarity of speech to its own reference, and to those of other voices.

    python examples/miniature/evaluate_voice.py --data runs/miniature/base-speech/held_out.jsonl \\
        --wavs runs/miniature/base-eval/wavs/base --speaker_model resemblyzer

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
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ, SpeakerEncoder
from higgs_tune.preprocess.judges.load import load_speaker_encoder


@dataclass(frozen=True)
class VoiceEvaluation:
    """Compare voices."""

    data: Path
    """List that higgs-eval took, with `speaker` and `ref_audio`."""
    wavs: Path
    """Folder of the spoken lines, ID.wav."""
    speaker_model: str
    """Speaker encoder, as higgs-eval takes it."""


def embed(encoder: SpeakerEncoder, paths: list[Path]) -> np.ndarray:
    """Speaker embeddings of length 1: [clips, dimensions]."""
    waves = []
    for path in paths:
        samples, rate_hz = soundfile.read(path, dtype="float32")
        waves.append(resample_soxr(samples, rate_hz, SAMPLE_RATE_HZ))
    vectors = np.stack([encoder.embed(wave) for wave in waves])
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


if __name__ == "__main__":
    main()
