"""Resampling of clips to the codec's rate by soxr, equal to librosa.resample with its defaults.

librosa itself is not imported: that takes seconds in every worker.

Shapes: S samples.
"""

from __future__ import annotations

import math

import numpy as np
import soxr


def resample_soxr(wave_S: np.ndarray, source_hz: int, target_hz: int) -> np.ndarray:
    """Resample float32 [S] to [ceil(S * target / source)]."""
    if source_hz == target_hz:
        return wave_S
    out_S = soxr.resample(wave_S, source_hz, target_hz, quality="HQ")
    samples = resampled_length(len(wave_S), source_hz, target_hz)
    return np.pad(out_S[:samples], (0, max(0, samples - len(out_S))))


def resampled_length(samples: int, source_hz: int, target_hz: int) -> int:
    """Length of the output of `resample_soxr` for an input of `samples`."""
    return math.ceil(samples * (target_hz / source_hz))
