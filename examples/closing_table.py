"""The demo's closing table: how far each stage's loss fell, from metrics.jsonl.

python examples/closing_table.py runs/toy-demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LEAST_FALL = 0.25


def main() -> None:
    demo = Path(sys.argv[1])
    print(f"{'stage':<8}{'loss':<12}{'steps':>6}{'first':>9}{'last':>9}{'fall':>8}   {'held out: base':>14}{'last':>9}")
    fell = True
    for stage, loss in (("stage1", "text_loss"), ("stage2", "audio_loss")):
        lines = [json.loads(line) for line in (demo / stage / "metrics.jsonl").read_text().splitlines()]
        train, held_out = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
        first, last = train[0][loss], train[-1][loss]
        fall = 1 - last / first
        fell &= fall >= LEAST_FALL
        print(f"{stage:<8}{loss:<12}{train[-1]['step']:>6}{first:>9.3f}{last:>9.3f}{fall:>8.1%}   "
              f"{held_out[0][loss]:>14.3f}{held_out[-1][loss]:>9.3f}")  # fmt: skip
    samples = [line for line in lines if line["kind"] == "samples"][-1]
    print(f"samples: {samples['run_on_rate']:.0%} run on (base {samples['base_run_on_rate']:.0%}), "
          f"{samples['duration_ratio']:.2f} times the target's duration; in {demo / 'stage2' / 'samples'}")  # fmt: skip
    print(f"report: {demo / 'report.html'}")
    if not fell:
        sys.exit(f"a loss fell by less than {LEAST_FALL:.0%}")


if __name__ == "__main__":
    main()
