"""What is measured of a segment from the levels of the first pass: signal-to-noise ratio and clipping.

Times are milliseconds. Shapes: L windows of 10 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from higgs_tune.preprocess.prepare.listen import Listened
from higgs_tune.preprocess.prepare.segment import LEVEL_MS, Span

AROUND_MS = 5000  # pauses this near to a segment tell its noise
EDGE_MS = 30  # of a pause, that may still be speech
LEAST_NOISE_WINDOWS = 10
MOST_SNR_DB = 80.0
QUIETEST_SHARE = 5  # percentile that stands for noise where there are no pauses


def _is_speech(windows: int, speech: Sequence[Span]) -> np.ndarray:
    """bool [L]: where somebody speaks, with an edge."""
    speech_L = np.zeros(windows, np.bool_)
    for start, end in speech:
        speech_L[max(0, start - EDGE_MS) // LEVEL_MS : (end + EDGE_MS) // LEVEL_MS] = True
    return speech_L


def _signal_to_noise(power_L: np.ndarray, speech_L: np.ndarray, span: Span) -> float:
    begin, end = span.start // LEVEL_MS, -(-span.end // LEVEL_MS)
    first, last = max(0, begin - AROUND_MS // LEVEL_MS), end + AROUND_MS // LEVEL_MS
    said = power_L[begin:end][speech_L[begin:end]]
    said = said if len(said) else power_L[begin:end]
    pauses = power_L[first:last][~speech_L[first:last]]
    noise = np.median(pauses) if len(pauses) >= LEAST_NOISE_WINDOWS else np.percentile(said, QUIETEST_SHARE)
    ratio = max(float(said.mean()) - float(noise), 1e-13) / max(float(noise), 1e-13)
    return round(min(MOST_SNR_DB, 10 * float(np.log10(max(ratio, 1e-8)))), 2)


def signal_to_noise(heard: Listened, spans: Sequence[Span], speech: Sequence[Span]) -> list[float]:
    """dB of each segment: power of the speech without the noise, against the median power of the pauses within and
    around it.

    Args:
        speech: all stretches of speech of the recording.
    """
    power_L = 10 ** (heard.levels_L.astype(np.float64) / -20)
    speech_L = _is_speech(len(power_L), speech)
    return [_signal_to_noise(power_L, speech_L, span) for span in spans]


def clipping(heard: Listened, span: Span) -> float:
    """Share of a segment's samples that are clipped."""
    window = heard.clipped_L[span.start // LEVEL_MS : -(-span.end // LEVEL_MS)]
    return round(float(window.mean()) / 255, 6) if len(window) else 0.0
