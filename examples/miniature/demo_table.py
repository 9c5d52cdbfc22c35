"""The demo's closing table: character errors by language, base against tuned against ceiling,
and the errors of the recogniser itself on held-out recordings.

python examples/miniature/demo_table.py runs/demo/eval examples/miniature/recogniser
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {"ar": "Arabic", "en": "English"}


def cell(figures: dict[str, Any]) -> str:
    """A rate in per cent, with its interval."""
    cer = figures["cer"]
    return f"{100 * cer['mean']:5.1f} % [{100 * cer['low']:.0f}, {100 * cer['high']:.0f}]"


def main() -> None:
    evaluation = json.loads((Path(sys.argv[1]) / "eval.json").read_text())
    columns = ("base", "tuned", "ceiling")
    print(f"{'character errors':<18}" + "".join(f"{name:>22}" for name in columns))
    for language, group in evaluation["groups"]["language"].items():
        figures = group["figures"]
        print(f"{NAMES[language]:<18}" + "".join(f"{cell(figures[name]):>22}" for name in columns))
    rates = json.loads((Path(sys.argv[2]) / "error_rates.json").read_text())
    own = ", ".join(f"{NAMES[language]} {100 * rate:.1f} %" for language, rate in rates.items())
    print(f"ceiling: what the codec decodes. The recogniser on recordings of all kinds of sentences: {own}")
    base, tuned = (evaluation["groups"]["language"]["ar"]["figures"][name]["cer"]["mean"] for name in columns[:2])
    if tuned > base / 2:
        sys.exit("the tuned model makes more than half of the base's errors in Arabic")


if __name__ == "__main__":
    main()
