"""higgs-eval as one rank, with a judge that hears words by a clip's bytes: `torchrun … eval_rank.py ARGUMENTS`."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence

import numpy as np
from higgs_tune.evaluate import cli
from higgs_tune.evaluate.judging import Judges

WORDS = ("the", "cat", "sat", "on", "a", "mat", "")


class Listener:
    """Hears a few words in any clip, always the same ones in the same clip."""

    name, revision = "listener", "1"

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        numbers = [zlib.crc32(np.round(wave_S * 32768).astype(np.int16).tobytes()) for wave_S in waves_S]
        return [" ".join(WORDS[number >> shift & 7 if number >> shift & 7 < 7 else 0] for shift in (0, 3, 6))
                for number in numbers]  # fmt: skip


def judges(_config: object) -> Judges:
    return Judges(Listener())


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    cli.load_judges = judges
    sys.argv[0] = "higgs-eval"
    cli.main()
