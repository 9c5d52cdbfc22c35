"""Options of higgs-preprocess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..shards.errors import UserError


@dataclass(frozen=True)
class PreprocessConfig:
    """Encode audio once, offline, into tar shards that the trainer streams."""

    data: Path
    """ChatML file: a JSON array, or JSONL. Audio paths in it are relative to its folder."""
    out: Path
    """Folder that receives the shard set. An interrupted run continues when started again."""
    model_path: Path
    """Checkpoint folder of the language model: config and tokenizer are read, not the weights."""
    audio_tokenizer_path: Path
    """Checkpoint folder of the audio tokenizer (the codec)."""
    val_fraction: float = 0.0
    """Share of samples held out for validation, 0 to 1; chosen by a hash, so it is stable."""
    val_by: Literal["sample", "speaker"] = "sample"
    """Hold out single samples, or whole speakers."""
    min_seconds: float = 0.1
    """Shortest clip that is taken, in seconds."""
    max_seconds: float = 60.0
    """Longest clip that is taken, in seconds."""
    samples_per_shard: int = 4096
    """Input samples a shard file."""
    clips_per_unit: int = 64
    """Audio clips encoded between two commits; a killed run loses at most this many a process."""
    num_processes: int = 1
    """Worker processes, each with its own codec."""
    device: str = "auto"
    """Where the codec runs: auto, cpu, cuda, cuda:1."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        checks = [
            ("val_fraction", 0 <= self.val_fraction <= 1, "0 to 1"),
            ("min_seconds", self.min_seconds >= 0, "at least 0"),
            ("max_seconds", self.min_seconds < self.max_seconds, "more than min_seconds"),
            ("samples_per_shard", self.samples_per_shard >= 1, "at least 1"),
            ("clips_per_unit", self.clips_per_unit >= 1, "at least 1"),
            ("num_processes", self.num_processes >= 1, "at least 1"),
        ]
        for name, good, expected in checks:
            if not good:
                raise UserError(f"--{name} is out of range", expected=expected, got=getattr(self, name))
