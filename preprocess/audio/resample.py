"""The two resamplers that Boson's tokenizer uses.

`resample_sinc` is inside the codec (24 to 16 kHz, for HuBERT): windowed sinc, equal to torchaudio.functional.resample
with its defaults (hann window). The method is Julius O. Smith's bandlimited interpolation
(https://ccrma.stanford.edu/~jos/resample/): every output phase is an inner product of the input with a windowed sinc,
so a rational rate change is one strided convolution. `resample_soxr` is before it (any rate to 24 kHz): soxr, equal to
librosa.resample with its defaults, whose import takes seconds in every worker.

Shapes: B clips, S samples.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import soxr
import torch
import torch.nn.functional as F  # noqa: N812

ZERO_CROSSINGS = 6  # of the sinc on each side
ROLLOFF = 0.99  # cutoff as a share of the lower Nyquist frequency


@lru_cache(maxsize=8)
def _kernel(source: int, target: int) -> tuple[torch.Tensor, int]:
    """float32 [target, 1, taps]: one filter for each output phase; and how many samples it reaches back."""
    cutoff = min(source, target) * ROLLOFF
    reach = math.ceil(ZERO_CROSSINGS * source / cutoff)
    taps = torch.arange(-reach, reach + source, dtype=torch.float64) / source
    phases = torch.arange(0, -target, -1, dtype=torch.float64) / target
    time = ((phases[:, None] + taps) * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = torch.cos(time * math.pi / ZERO_CROSSINGS / 2) ** 2
    sinc = torch.where(time == 0, 1.0, torch.sin(time * math.pi) / (time * math.pi))
    return (sinc * window * cutoff / source).float()[:, None], reach


def resample_sinc(wave_BS: torch.Tensor, source_hz: int, target_hz: int) -> torch.Tensor:
    """Resample float [B, S] to [B, ceil(S * target / source)]."""
    if source_hz == target_hz:
        return wave_BS
    common = math.gcd(source_hz, target_hz)
    source, target = source_hz // common, target_hz // common
    kernel, reach = _kernel(source, target)
    padded = F.pad(wave_BS[:, None], (reach, reach + source))
    phases_BPN = F.conv1d(padded, kernel.to(wave_BS), stride=source)
    samples = math.ceil(target * wave_BS.shape[1] / source)
    return phases_BPN.transpose(1, 2).reshape(len(wave_BS), -1)[:, :samples]


def resample_soxr(wave_S: np.ndarray, source_hz: int, target_hz: int) -> np.ndarray:
    """Resample float32 [S] to [ceil(S * target / source)]."""
    if source_hz == target_hz:
        return wave_S
    out_S = soxr.resample(wave_S, source_hz, target_hz, quality="HQ")
    samples = resampled_length(len(wave_S), source_hz, target_hz)
    return np.pad(out_S[:samples], (0, max(0, samples - len(out_S))))


def resampled_length(samples: int, source_hz: int, target_hz: int) -> int:
    """Samples that `resample_soxr` makes of `samples`."""
    return math.ceil(samples * (target_hz / source_hz))
