"""higgs-prepare: from long recordings to a manifest for higgs-preprocess.

higgs-prepare RECORDINGS… --out DIR --language ar --asr openai/whisper-large-v3
higgs-prepare --from DIR --min_quality 2.8
higgs-prepare review DIR                        a page on this machine in which people decide
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from higgs_tune.preprocess.prepare.config import MACHINE_ONLY, PrepareConfig, Thresholds
from higgs_tune.shards.errors import UserError, few, run_command


@dataclass(frozen=True)
class ReviewConfig:
    """The report of a prepared folder on this machine only, with a list in which people accept, reject and correct.

    Decisions are appended to DIR/decisions.jsonl; `higgs-prepare --from DIR` applies them.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder that higgs-prepare wrote."""
    port: int = 8733
    """Port on 127.0.0.1; 0: any free port."""
    debug: bool = False
    """Show tracebacks of user errors."""


def main() -> None:
    run_command(_main)


def _review(arguments: list[str]) -> None:
    from higgs_tune.preprocess.prepare.review_server import HOST, open_review

    given = tyro.cli(ReviewConfig, prog="higgs-prepare review", args=arguments)
    server = open_review(given.folder, given.port)
    print(f"http://{HOST}:{server.port}/  (Ctrl-C ends)", flush=True)
    server.serve_forever()


def _main() -> None:
    if sys.argv[1:2] == ["review"]:  # a folder of this name is ./review
        _review(sys.argv[2:])
        return
    config = tyro.cli(PrepareConfig, prog="higgs-prepare")
    if config.from_ is not None:
        _print_summary(_decide_again(config))
        return
    from higgs_tune.preprocess.engine import Stopped  # torch takes seconds to import; flags are parsed before
    from higgs_tune.preprocess.prepare.pipeline import prepare

    try:
        _print_summary(prepare(config))
    except Stopped as stopped:
        print(f"stopped on {stopped}: start the same command again to continue", file=sys.stderr)
        sys.exit(128 + stopped.number)


def _decide_again(given: PrepareConfig) -> dict[str, Any]:
    """The saved options with the thresholds that are given now.

    Raises:
        UserError: another option is given.
    """
    from higgs_tune.preprocess.prepare.pipeline import decide_again, saved_config

    assert given.from_ is not None
    saved = saved_config(given.from_)
    config = tyro.cli(PrepareConfig, prog="higgs-prepare", default=replace(saved, from_=given.from_))
    free = {item.name for item in fields(Thresholds)} | set(MACHINE_ONLY)
    changed = [name for name in PrepareConfig.__dataclass_fields__
               if name not in free and getattr(config, name) != getattr(saved, name)]  # fmt: skip
    if changed:
        hint = "Run without --from to measure anew; what is measured already is not measured again."
        raise UserError("--from takes thresholds alone", got=few([f"--{name}" for name in changed]), hint=hint)
    return decide_again(config)


def _print_summary(summary: dict[str, Any]) -> None:
    made, counts = summary["accounting"], summary["segments"]
    print(f"input      {_hours(made['input_ms'])}")
    for fate, length in made["fates_ms"].items():
        count = f"{counts[fate]} segments" if fate in counts else ""
        print(f"  {fate:<16}{_hours(length):>12}  {count}".rstrip())
    for one in summary["errors"]:
        print(f"not used   {one.path!r}: {one.error}")
    for path, why in summary["bad_transcripts"].items():
        print(f"no text    {path!r}: {why}")
    if not counts.get("kept"):
        print("nothing is kept: rejects.jsonl names the reason of each segment", file=sys.stderr)
    print(f"written    {summary['out']}")
    print(f"next       higgs-preprocess --data {summary['out']}/manifest.jsonl --val_by split …")


def _hours(milliseconds: int) -> str:
    seconds = milliseconds / 1000
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"
