"""higgs-preprocess: build a shard set.

higgs-preprocess --data chatml.json --out SHARDS --model_path M --audio_tokenizer_path T
"""

from __future__ import annotations

import time

import tyro

from ..shards.errors import run_command
from .config import PreprocessConfig


def main() -> None:
    run_command(_main)


def _main() -> None:
    config = tyro.cli(PreprocessConfig, prog="higgs-preprocess")
    from .pipeline import build  # after the flags are checked: torch takes seconds to import

    began = time.monotonic()
    summary = build(config)
    if summary["already_built"]:
        print(f"{config.out} is already built from this data with these options: nothing to do")
        return
    elapsed = max(time.monotonic() - began, 1e-9)
    rejects = summary["rejects"]
    print(f"samples   {summary['samples']} in {config.out}")
    print(f"audio     {summary['seconds'] / 3600:.3f} h in samples, {summary['clips']} distinct clips")
    print(f"speed     {summary['encoded_seconds'] / elapsed:.1f} hours an hour ({elapsed:.0f} s)")
    print(f"rejects   {sum(rejects.values())}" + (f", see {config.out / 'rejects.jsonl'}" if rejects else ""))
    for reason, count in sorted(rejects.items()):
        print(f"  {reason:<24}{count}")
