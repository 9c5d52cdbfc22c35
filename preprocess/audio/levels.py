"""Levels of a clip: silence, clipping, integrated loudness.

Shapes: S samples, C channels.
"""

from __future__ import annotations

import numpy as np
from higgs_tune.preprocess.audio.options import Flag
from higgs_tune.preprocess.reject import Reject

MAX_CANCELLED = 0.1  # share of power left in the mix; independent channels leave a half


def quiet_share(samples_SC: np.ndarray, rate_hz: int, *, below_dbfs: float) -> float:
    """Share of a clip's 20 ms windows whose level is below `below_dbfs`, relative to full scale."""
    window = max(1, rate_hz // 50)
    whole = samples_SC[: max(len(samples_SC) // window, 1) * window]
    windows = whole.reshape(-1, min(window, len(whole)) * samples_SC.shape[1])
    return float(np.mean(np.mean(np.square(windows), axis=1) < 10 ** (below_dbfs / 10)))


def clip_flags(samples_SC: np.ndarray, mono_S: np.ndarray, rate_hz: int) -> tuple[Flag, ...]:
    """Faults of a recording.

    silence: 90 % of the 20 ms windows of the mono mix, which is what gets encoded, are below -60 dBFS.
    clipping: three samples of a channel in a row at full scale.
    antiphase: the mix has less than a tenth of the channels' power, since they cancel each other.
    """
    flags: list[Flag] = []
    if quiet_share(mono_S[:, None], rate_hz, below_dbfs=-60.0) >= 0.9:
        flags.append("silence")
    full = np.abs(samples_SC) >= 0.999
    if (full[2:] & full[1:-1] & full[:-2]).any():
        flags.append("clipping")
    power = float(np.mean(np.square(samples_SC)))
    if samples_SC.shape[1] > 1 and float(np.mean(np.square(mono_S))) < MAX_CANCELLED * power:
        flags.append("antiphase")
    return tuple(flags)


def normalize_loudness(mono_S: np.ndarray, rate_hz: int, target_lufs: float, source: str) -> np.ndarray:
    """Boson's `loudness_normalize`: BS.1770 gain on the mono mix, before resampling.

    Raises:
        Reject: the clip is silent, or shorter than the 0.4 s that BS.1770 measures.
    """
    import pyloudnorm  # brings scipy's signal package, which takes a second

    try:
        measured = pyloudnorm.Meter(rate_hz).integrated_loudness(mono_S)
    except ValueError as error:
        raise Reject("unmeasurable_loudness", f"{error}", source) from error
    if not np.isfinite(measured):
        raise Reject("unmeasurable_loudness", "silent", source)
    gain = 10.0 ** ((target_lufs - measured) / 20.0)
    return (mono_S * gain).astype(np.float32)
