"""Audio clips for the page, compressed.

In: codes or waveforms. Out: Ogg Vorbis, which Chromium, Firefox and Safari play and which encodes ten times as fast as
Opus.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from higgs_tune.shards.errors import UserError

MEDIA_TYPE = "audio/ogg"
COMPRESSION = 0.8  # of libsndfile, 0 to 1: about 40 kbit/s for mono speech at 24 kHz


def ogg(wave_S: np.ndarray, sample_rate_hz: int) -> bytes:
    """Encode a mono clip; samples beyond full scale are clipped."""
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


def decode_all(codec: Any, clips: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, bytes]]:
    """Decode and compress named codes [K, T], in order, one clip per core.

    One thread per clip: on a busy machine the threads of one convolution wait for each other longer than they work.
    """
    import torch

    def work(codes_KT: np.ndarray) -> bytes:
        return ogg(codec.decode(codes_KT), codec.config.sample_rate_hz)

    workers, before = os.cpu_count() or 1, torch.get_num_threads()
    waiting: deque[tuple[str, Future[bytes]]] = deque()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for name, codes_KT in clips:
                waiting.append((name, pool.submit(work, codes_KT)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
    finally:
        torch.set_num_threads(before)
