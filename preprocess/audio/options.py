"""Options of reading audio, importable without a numeric library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Flag = Literal["silence", "clipping", "antiphase"]


@dataclass(frozen=True)
class AudioOptions:
    """Which clips are taken, and how loud.

    Attributes:
        min_seconds, max_seconds: shortest and longest clip that is taken, in seconds.
        loudness_lufs: integrated loudness that clips are brought to; None: clips keep their level.
        roots: folders that no path may leave; empty: no limit.
        reject_flags: flags that a clip may not have.
    """

    min_seconds: float
    max_seconds: float
    loudness_lufs: float | None = None
    roots: tuple[Path, ...] = ()
    reject_flags: tuple[Flag, ...] = ()
