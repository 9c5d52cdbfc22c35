"""A piece of audio that samples refer to, and the waveform that is read of it.

Shapes: S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from higgs_tune.preprocess.audio.options import Flag


@dataclass(frozen=True)
class Clip:
    """One piece of audio that samples refer to; equal clips are encoded once.

    Attributes:
        source: the path as the data names it; for inline audio `inline:` and its SHA-256.
        path: where to read it; empty for inline audio.
        inline: base64 of the file's bytes, or empty.
        offset_s, duration_s: the part to take, in seconds; None: from the start, to the end.
    """

    source: str
    path: str
    inline: str = ""
    offset_s: float | None = None
    duration_s: float | None = None


@dataclass(frozen=True)
class Waveform:
    """A clip that was read.

    Attributes:
        samples_S: float32 [S], mono.
        seconds: length in the source file.
        sha256: of the source file's bytes.
        flags: faults of the recording.
    """

    samples_S: np.ndarray
    seconds: float
    sha256: str
    flags: tuple[Flag, ...]
