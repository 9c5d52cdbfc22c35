"""The page of an evaluation: table, findings, and every line with players and marked differences, worst first.

In: the utterances of each system, and the content of eval.json. Out: `index.html`, which runs no script and plays the
wavs from where they are. Text from the data is escaped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from higgs_tune.evaluate.figures import Systems, verdict
from higgs_tune.evaluate.findings import LEAKS, LIST_FINDINGS
from higgs_tune.evaluate.utterances import Utterance
from higgs_tune.preprocess.judges.edits import differences
from higgs_tune.shards.durable import atomic_file

SHOWN_LINES = 2000
COLUMNS = {
    "wer": ("WER", True), "wer_mean": ("WER, mean of lines", True), "cer": ("CER", True),
    "cer_mean": ("CER, mean of lines", True), "sim": ("similarity", False), "quality": ("quality", False),
    "run_on_rate": ("run on", True), "silence": ("silence", True), "chars_per_second": ("characters/s", False),
    "duration_ratio": ("duration / target", False),
}  # fmt: skip

COUNTED = {
    "utterances": "lines", "problems": "with a problem", "words": "words", "word_substitutions": "substituted",
    "word_deletions": "deleted", "word_insertions": "inserted", "characters": "characters",
    "character_substitutions": "substituted", "character_deletions": "deleted", "character_insertions": "inserted",
}  # fmt: skip


def shown_figure(figure: dict[str, float] | None, percent: bool, *, signed: bool = False) -> str:
    """A figure with its interval as text."""
    if figure is None:
        return "–"
    scale, digits = (100, 2) if percent else (1, 3)
    mean, low, high = (f"{figure[name] * scale:{'+' if signed else ''}.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def write_page(out: Path, systems: Systems, result: dict[str, Any]) -> None:
    """Write `index.html` into the evaluation's folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    judged_by = {name: ", ".join(filter(None, given.values())) for name, given in result["about"]["figures"].items()}
    environment.globals.update(shown=shown_figure, columns=COLUMNS, counted=COUNTED, verdict=verdict)
    environment.globals.update(judged_by=judged_by, leaks=LEAKS, list_findings=LIST_FINDINGS)
    spoken = {name: said for name, said in systems.items() if name != "floor"}
    rows = sorted(zip(*spoken.values(), strict=True), key=_badness, reverse=True)
    stream = environment.get_template("page.html").stream(
        result=result,
        systems=list(systems),
        spoken=list(spoken),
        rows=[[_cell(utterance, out) for utterance in row] for row in rows[:SHOWN_LINES]],
        left_out=max(0, len(rows) - SHOWN_LINES),
    )
    with atomic_file(out / "index.html") as file:
        stream.dump(file, encoding="utf-8")


def _badness(row: tuple[Utterance, ...]) -> tuple[float, float]:
    """Sorts lines: the highest character error rate of any system, then the lowest similarity."""
    near = [utterance.similarity for utterance in row if utterance.similarity is not None]
    return max((utterance.cer for utterance in row if utterance.counted), default=0.0), -min(near, default=0.0)


def _cell(utterance: Utterance, out: Path) -> dict[str, Any]:
    line, judged = utterance.line, utterance.judged
    return {
        "line": line,
        "problem": judged.problem,
        "detail": judged.detail,
        "differences": differences(utterance.text.split(), utterance.heard.split()),
        "counted": utterance.counted,
        "wer": utterance.wer,
        "cer": utterance.cer,
        "sim": utterance.similarity if utterance.counted else None,
        "quality": (utterance.quality or {}).get("overall") if utterance.counted else None,
        "seconds": judged.seconds,
        "wav": _link(utterance.wav, out) if judged.seconds is not None or judged.problem == "too_long" else "",
        "reference": _link(line.ref_audio, out),
        "reference_fault": utterance.reference_fault,
    }


def _link(path: str, out: Path) -> str:
    """A file's address from the page; empty for none, and for audio inside another file."""
    try:
        return quote(os.path.relpath(path, out)) if path and Path(path).is_file() else ""
    except (OSError, ValueError):  # a path that no file can have
        return ""
