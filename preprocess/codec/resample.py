"""Windowed-sinc resampling inside the codec: 24 kHz to HuBERT's 16 kHz.

Equal to torchaudio.functional.resample with its defaults (hann window), on which the codec was trained. The method is
Julius O. Smith's bandlimited interpolation (https://ccrma.stanford.edu/~jos/resample/): every output phase is an inner
product of the input with a windowed sinc, so a rational rate change is one strided convolution.

Shapes: B clips, S samples.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812

ZERO_CROSSINGS = 6  # of the sinc on each side
ROLLOFF = 0.99  # cutoff as a share of the lower Nyquist frequency


@lru_cache(maxsize=8)
def _kernel(source: int, target: int) -> tuple[torch.Tensor, int]:
    """One filter for each output phase, float32 [target, 1, taps], and the samples that it reaches back."""
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
