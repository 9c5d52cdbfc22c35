"""A training run's output folder as the trainer leaves it, made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

STEPS = ("base", "step-000500")


def write_run(folder: Path, keys: list[str], text: str = "السَّلَامُ عَلَيْكُمْ") -> Path:
    """Curves, validation, generated samples of `keys`, what trained; `text` stands wherever a run holds text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for step in range(0, 501, 50) for line in _lines(step)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    (folder / "config.yaml").write_text(json.dumps({"options": {"seed": 42, "note": text}}))
    modules = [{"module": f"layers.{i}.q_proj.{text}", "shape": [16, 64], "count": 1024} for i in range(4)]
    (folder / "trainable.json").write_text(json.dumps(modules))
    for number, step in enumerate(STEPS):
        entries = [_generated(folder, step, key, text, 200.0 + 100 * number) for key in keys]
        (folder / "samples" / step / "samples.json").write_text(json.dumps(entries))
    for key in keys:
        for kind in ("target", "reference"):
            _tone(folder / "samples" / "target" / f"{key}.{kind}.wav", 400.0)
    return folder


def _lines(step: int) -> list[dict[str, Any]]:
    gone = math.exp(-step / 100)
    losses = {"text_loss": 1 + gone, "audio_loss": 4 + 2 * gone, "audio_loss_per_codebook": [3 + gone] * 8}
    speed = {"tokens_per_second": 4e4, "data_wait_fraction": 0.002, "step_time_s": 0.4, "grad_norm": "nan"}
    train = {"kind": "train", "step": step, **losses, **speed, "learning_rate": 1e-4}
    hits = {"text_accuracy": 0.5, "audio_accuracy": 0.2, "audio_accuracy_per_codebook": [0.2] * 8}
    return [train, {"kind": "eval", "step": step, **losses, "eos_loss": gone, **hits}]


def _generated(folder: Path, step: str, key: str, text: str, hertz: float) -> dict[str, Any]:
    _tone(folder / "samples" / step / f"{key}.wav", hertz)
    known = {"duration_s": 1.0, "target_duration_s": 1.0, "duration_ratio": 1.0, "silence_ratio": 0.1}
    ended = {"reached_eos": step != "base"}
    return {"key": key, "text": text, "target_text": text, "wav": f"{key}.wav", **known, **ended}


def _tone(path: Path, hertz: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time_S = np.arange(24_000) / 24_000
    soundfile.write(path, (0.3 * np.sin(2 * np.pi * hertz * time_S)).astype(np.float32), 24_000)
