"""Audio clips for the page, compressed.

In: codes or files. Out: Ogg Vorbis.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from higgs_tune.preprocess.audio.vorbis import ogg
from higgs_tune.shards.errors import UserError


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
