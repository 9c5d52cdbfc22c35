"""Audio for a page: compressed clips that browsers play.

In: waveforms. Out: Ogg Vorbis, which Chromium, Firefox and Safari play, keeps the exact length, and takes a tenth of
Opus's time to encode. Never: louder than full scale.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from ..shards.errors import UserError

MEDIA_TYPE = "audio/ogg"
COMPRESSION = 0.7  # of libsndfile, 0 to 1: about 40 kbit/s for mono speech at 24 kHz


def ogg(wave_S: np.ndarray, sample_rate_hz: int) -> bytes:
    """Encode a mono clip."""
    buffer = io.BytesIO()
    wave_S = np.clip(wave_S, -1, 1)
    soundfile.write(buffer, wave_S, sample_rate_hz, format="OGG", subtype="VORBIS", compression_level=COMPRESSION)
    return buffer.getvalue()


def ogg_of_file(path: Path) -> bytes:
    """Encode an audio file, mixed down.

    Raises:
        UserError: it cannot be read.
    """
    try:
        wave_SC, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return ogg(wave_SC.mean(axis=1), rate)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read audio: {error}", where=path) from error
