"""higgs-preprocess: builds a shard set, or checks the data first.

higgs-preprocess --data chatml.json --out SHARDS --model_path M --audio_tokenizer_path T
higgs-preprocess --check --data chatml.json --model_path M
"""

from __future__ import annotations

import sys
import time
from typing import Any

import tyro
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.shards.errors import run_command


def main() -> None:
    run_command(_main)


def _main() -> None:
    config = tyro.cli(PreprocessConfig, prog="higgs-preprocess")
    from higgs_tune.preprocess.engine import Stopped  # torch takes seconds to import; flags are parsed before

    try:
        _check(config) if config.check else _build(config)
    except Stopped as stopped:
        more = "" if config.check else ": start the same command again to continue"
        print(f"stopped on {stopped}{more}", file=sys.stderr)
        sys.exit(128 + stopped.number)


def _check(config: PreprocessConfig) -> None:
    from higgs_tune.preprocess.check import check_data
    from higgs_tune.preprocess.check_report import print_report

    report = check_data(config)
    print_report(report, as_json=config.json)
    sys.exit(0 if report["fit_to_build"] else 1)


def _build(config: PreprocessConfig) -> None:
    from higgs_tune.preprocess.pipeline import build_shards

    began = time.monotonic()
    _print_summary(build_shards(config), config, time.monotonic() - began)


def _print_summary(summary: dict[str, Any], config: PreprocessConfig, elapsed: float) -> None:
    from higgs_tune.preprocess.check_report import describe_sides

    rejects = summary["rejects"]
    if summary["already_built"]:
        print(f"{config.out} is already built from this data with these options: nothing to do")
        print(f"It holds {summary['samples']} samples; {sum(rejects.values())} were rejected.")
        print("To build anew, choose another --out, or remove this one.")
        return
    print(f"samples   {summary['samples']} in {config.out}")
    print(f"audio     {summary['seconds'] / 3600:.3f} h in samples, {summary['clips']} distinct clips")
    print(f"held out  {describe_sides(summary['sides'], config.val_fraction)}")
    print(f"speed     {summary['encoded_seconds'] / max(elapsed, 1e-9):.1f} hours an hour ({elapsed:.0f} s)")
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary["spent"].items())
    print(f"spent     {spent or 'nothing: all was encoded before'}")
    for flag, count in sorted(summary["flags"].items()):
        print(f"flagged   {count} clips for {flag}")
    print(f"rejects   {sum(rejects.values())}" + (f", see {config.out}/rejects.jsonl" if rejects else ""))
    for reason, count in sorted(rejects.items()):
        print(f"  {reason:<24}{count}")
    if summary["advice"]:
        print(f"hint      {summary['advice']}")
