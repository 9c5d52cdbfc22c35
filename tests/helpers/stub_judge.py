"""A judge that knows the truth from a clip's first samples, and evaluations with it; imports no model library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.evaluate import evaluate
from higgs_tune.evaluate.judging import Judges

RATE = 16_000
TEXTS = (
    "the cat sat on the mat",
    "a dog ran",
    "birds fly south in winter",
    "yes",
    "rain fell all night",
    "go home now",
)


class Stub:
    """Every judge at once: the first sample of a clip is the number of what is heard, the second of its voice."""

    name, revision = "stub", "1"

    def __init__(self, heard: Sequence[str]) -> None:
        self.heard, self.asked = list(heard), 0

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        self.asked += len(waves_S)
        return [self.heard[round(float(wave_S[0]) * 32768)] for wave_S in waves_S]

    def embed(self, wave_S: np.ndarray) -> np.ndarray:
        angle = round(float(wave_S[1]) * 32768) / 100
        return np.array([np.cos(angle), np.sin(angle)], np.float32)

    def score(self, wave_S: np.ndarray) -> dict[str, float]:
        return {"overall": 3.5, "speech": 4.0}


def write_wav(path: Path, heard: int, voice: int = 0, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = (np.sin(np.arange(int(seconds * RATE)) / 9) * 9000).astype(np.int16)
    samples[:2] = heard, voice
    soundfile.write(path, samples, RATE, subtype="PCM_16")


def run(setting: Path, systems: Sequence[str] = ("good",), stub: Stub | None = None, **options: Any) -> dict[str, Any]:
    judge = stub or Stub(TEXTS)
    config = EvalConfig(
        out=setting / "out",
        asr="stub",
        data=(str(setting / "list.jsonl"),),
        wavs=tuple(f"{name}={setting / name}" for name in systems),
        language="en",
        speaker_model="stub",
        quality="stub",
        **options,
    )
    return evaluate(config, lambda _config: Judges(judge, judge, judge))
