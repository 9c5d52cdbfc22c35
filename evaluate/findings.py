"""Findings of an evaluation: faults of the list and of the systems, and lines that the training data hold.

In: lines, utterances, references. Out: plain dicts for `eval.json`, that the page and the terminal show, too.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from higgs_tune.evaluate.config import EvalConfig
from higgs_tune.evaluate.figures import Systems, find_swaps
from higgs_tune.evaluate.held_out import audio_hashes, find_leaks
from higgs_tune.evaluate.judging import System
from higgs_tune.evaluate.lists import Line
from higgs_tune.evaluate.utterances import Utterance
from higgs_tune.preprocess.judges.normalisers import Normaliser
from higgs_tune.shards.errors import few

FLOOR = "floor"  # row of the table without findings: no system said it
LEAKS = {  # as they are shown, after their number
    "reference_audio": "reference clips",
    "target_audio": "real recordings",
    "text": "texts",
    "speaker": "speakers",
}
LIST_FINDINGS = {
    "bad_lines": "{count} lines of the list cannot be judged, and count as wrong",
    "without_reference": "{count} lines have no usable reference, so their similarity is not measured",
    "without_target": "{count} lines have no usable real recording, and are not in the ceiling",
}


def leakage(config: EvalConfig, lines: list[Line], chosen: Normaliser) -> list[dict[str, Any]]:
    """What the training samples of each set share with the lines (see `find_leaks`)."""
    sets = [*config.leakage, *([config.shards] if config.shards and config.split == "val" else [])]
    if not sets:
        return []
    hashes = audio_hashes(lines)
    return [find_leaks(lines, hashes, location, chosen) for location in dict.fromkeys(sets)]


def without_reference(lines: list[Line], references: dict[str, np.ndarray | str]) -> list[dict[str, str]]:
    """The lines whose similarity cannot be measured, and why."""
    faults = {path: given for path, given in references.items() if isinstance(given, str)}
    return [{"id": x.id, "fault": faults[x.ref_audio]} for x in lines if x.ref_audio in faults and not x.fault]


def list_findings(
    lines: list[Line], references: dict[str, np.ndarray | str], ceiling: list[Utterance]
) -> dict[str, list[dict[str, str]]]:
    """Faults of the list itself, which are no system's."""
    return {
        "bad_lines": [{"id": line.id, "place": line.place, "fault": line.fault} for line in lines if line.fault],
        "without_reference": without_reference(lines, references),
        "without_target": [
            {"id": u.line.id, "fault": f"{u.judged.problem}: {u.judged.detail}"}
            for u in ceiling
            if not u.counted and not u.line.fault
        ],
    }


def findings(systems: Systems, spoken: dict[str, System]) -> dict[str, Any]:
    """Faults by system: lines with a problem, files of no line, lines that speak another's text or did not end."""
    found = {}
    for name, said in systems.items():
        if name == FLOOR:
            continue
        problems = [
            {"id": u.line.id, "problem": u.judged.problem, "detail": u.judged.detail}
            for u in said
            if u.judged.problem and u.counted
        ]
        found[name] = {
            "problems": problems,
            "cut_off": [u.line.id for u in said if u.judged.cut_off],
            "files_of_no_line": spoken[name].strangers([u.line for u in said]) if name in spoken else [],
            "speaks_other_line": find_swaps(said),
        }
    return found


def warn_of_swaps(name: str, said: list[Utterance]) -> None:
    """Tell, before the figures, that files may have the wrong names."""
    swaps = find_swaps(said)
    if swaps:
        shown = few([f"{line} speaks {other}" for line, other in swaps.items()])
        count = f"{len(swaps)} of {len(said)} lines speak another line's text"
        print(f"warning: {name}: {count}: {shown}. Are the files named by their ids?", file=sys.stderr, flush=True)
