"""Measure what higgs-prepare made of the recordings of `bench/prepare_truth.py` against what is known of them.

    python bench/prepare_truth.py --out runs/truth
    higgs-prepare runs/truth/recordings --out runs/prepared --language en --asr WHISPER --speaker_model resemblyzer
    python bench/prepare_score.py runs/prepared --truth runs/truth [--json FILE]

Prints a table: figure, measured, wanted. Exit code 1 where a figure misses its bar; a figure that was not measured
(no recogniser, no speaker model) is shown as such and misses none.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.normalisers import normaliser
from higgs_tune.preprocess.prepare.records import ACCOUNTING, Segment, read_segments
from rich.console import Console
from rich.table import Table

NEAR_S = 0.15  # a boundary this near to that of a stretch of sound is right
CUT_S = 0.03  # a boundary this deep in a stretch of sound cuts a word
WRONG_CER, RIGHT_CER = 0.3, 0.05  # a text this far from what is said is wrong; this near, right


@dataclass(frozen=True)
class Options:
    """Measure a prepared folder against the truth."""

    prepared: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder that higgs-prepare wrote."""
    truth: Path
    """Folder that bench/prepare_truth.py wrote."""
    json: Path | None = None
    """File that receives the figures."""


@dataclass(frozen=True)
class Figure:
    """One measurement. good, of: counts (or seconds); bar: the smallest share that will do, None: for information."""

    name: str
    good: float
    of: float
    bar: float | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """None: nothing to measure."""
        return self.good / self.of if self.of else None

    @property
    def misses(self) -> bool:
        return self.bar is not None and self.share is not None and self.share < self.bar


@dataclass(frozen=True)
class Heard:
    """A segment and the sentences of the truth that it holds at least half of."""

    segment: Segment
    sentences: list[dict[str, Any]]
    runs: list[tuple[float, float]]

    @property
    def said(self) -> str:
        return " ".join(sentence["text"] for sentence in self.sentences)

    @property
    def voices(self) -> dict[str, float]:
        """Seconds of each voice."""
        seconds = defaultdict[str, float](float)
        for sentence in self.sentences:
            seconds[sentence["voice"]] += overlap(self.segment, sentence["start"], sentence["end"])
        return seconds

    @property
    def faults(self) -> set[str]:
        return {fault for sentence in self.sentences for fault in sentence["faults"]}


def overlap(segment: Segment, start: float, end: float) -> float:
    return max(0.0, min(segment.end, end) - max(segment.start, start))


def join_truth(segments: Iterable[Segment], truth: dict[str, Any]) -> list[Heard]:
    """Each segment with its sentences, by the recording's file name."""
    by_name = {Path(recording["path"]).name: recording["sentences"] for recording in truth["recordings"]}
    joined = []
    for segment in segments:
        sentences = by_name[Path(segment.recording).name]
        held = [s for s in sentences if overlap(segment, s["start"], s["end"]) > 0.5 * (s["end"] - s["start"])]
        joined.append(Heard(segment, held, [tuple(run) for s in sentences for run in s["runs"]]))
    return joined


def boundaries(heard: Sequence[Heard]) -> list[Figure]:
    """Start and end near those of a stretch of sound, and outside of any."""
    near = whole = 0
    for one in heard:
        start, end, runs = one.segment.start, one.segment.end, one.runs
        starts, ends = (min(abs(run[side] - at) for run in runs) for side, at in ((0, start), (1, end)))
        near += starts <= NEAR_S and ends <= NEAR_S
        whole += not any(a + CUT_S < at < b - CUT_S for at in (start, end) for a, b in runs)
    return [
        Figure("boundaries within 150 ms", near, len(heard), 0.95),
        Figure("segments that cut no word", whole, len(heard), 1.0),
    ]


def covered(heard: Sequence[Heard], truth: dict[str, Any]) -> Figure:
    """Seconds of speech that some segment holds."""
    held = sum(overlap(one.segment, a, b) for one in heard for a, b in one.runs)
    said = sum(b - a for recording in truth["recordings"] for s in recording["sentences"] for a, b in s["runs"])
    return Figure("seconds of speech in segments", round(held, 1), round(said, 1))


def transcripts(heard: Sequence[Heard]) -> list[Figure]:
    """Wrong texts that were rejected, right ones that agreement did not reject, and texts of the recogniser."""
    rules = normaliser("omnivoice")
    wrong, right, rates = [], [], []
    for one in heard:
        if one.segment.text is None or not one.sentences:
            continue
        rate = count_edits(rules.apply(one.said), rules.apply(one.segment.text)).rate
        if one.segment.text_source == "asr":
            rates.append(rate)
        elif rate >= WRONG_CER:
            wrong.append(one.segment)
        elif rate <= RIGHT_CER:
            right.append(one)
    lost = [one for one in right if step_of(one.segment) == "agreement"]
    clean = [one for one in right if not one.faults and step_of(one.segment) not in ("duplicate", "segment")]
    checked = any(segment.cer is not None for segment in wrong)
    right = right if checked else []
    return [
        Figure(
            "wrong transcripts rejected", sum(not s.keep for s in wrong) if checked else 0, len(wrong) * checked, 0.95
        ),
        Figure("right transcripts not lost to agreement", len(right) - len(lost), len(right), 0.95),
        Figure("right transcripts of clean sound kept", sum(one.segment.keep for one in clean), len(clean)),
        Figure("recognised texts within 20 % CER", sum(rate <= 0.2 for rate in rates), len(rates)),
    ]


def step_of(segment: Segment) -> str:
    return segment.reject.step if segment.reject else ""


def duplicates(heard: Sequence[Heard]) -> Figure:
    """Pairs of segments that hold the same sound, of which not both are kept."""
    groups = defaultdict(list)
    for one in heard:
        key = tuple((s["voice"], s["text"]) for s in one.sentences)
        if key:
            groups[key].append(one.segment)
    pairs = [sum(s.keep for s in group) <= 1 for group in groups.values() if len(group) > 1]
    return Figure("groups of the same sound kept once", sum(pairs), len(pairs), 1.0)


def false_duplicates(heard: Sequence[Heard]) -> Figure:
    """Segments called duplicates that share a sentence with the one that is kept for them."""
    by_id = {one.segment.id: one for one in heard}
    called = [(one, by_id[one.segment.duplicate_of]) for one in heard if one.segment.duplicate_of]
    said = [({s["text"] for s in one.sentences} & {s["text"] for s in kept.sentences}) for one, kept in called]
    return Figure("duplicates that are some", sum(map(bool, said)), len(called), 1.0)


def speakers(heard: Sequence[Heard]) -> list[Figure]:
    """Purity: segments whose voice is the most frequent one of their speaker."""
    clusters, mixed, counted = defaultdict(Counter), 0, 0
    for one in heard:
        if one.segment.speaker is None or not one.sentences:
            continue
        seconds, voice = max((seconds, voice) for voice, seconds in one.voices.items())
        counted += 1
        mixed += seconds < 0.8 * sum(one.voices.values())
        clusters[one.segment.speaker][voice] += 1
    voices = {voice for cluster in clusters.values() for voice in cluster}
    pure = sum(max(cluster.values()) for cluster in clusters.values())
    together = sum(max(cluster[voice] for cluster in clusters.values()) for voice in voices)
    bar = 0.95 if any(one.segment.embedding_map for one in heard) else None
    return [
        Figure("purity of speakers", pure, counted, bar, f"{len(clusters)} speakers of {len(voices)} voices"),
        Figure("segments in their voice's largest speaker", together, counted),
        Figure("segments of one voice", counted - mixed, counted),
    ]


def leaks(heard: Sequence[Heard]) -> list[Figure]:
    """What both splits hold: speakers, voices, recordings, texts, sounds; and references from the own recording."""
    kept = [one for one in heard if one.segment.keep]
    sides = {split: [one for one in kept if one.segment.split == split] for split in ("train", "val")}
    figures = []
    for name, of in (
        ("speaker", lambda one: [one.segment.speaker]),
        ("voice", lambda one: list(one.voices)),
        ("recording", lambda one: [one.segment.recording]),
        ("text", lambda one: [one.segment.text]),
        ("sound", lambda one: [(s["voice"], s["text"]) for s in one.sentences]),
    ):
        train, val = ({key for one in side for key in of(one)} for side in sides.values())
        bar = 1.0 if train and val else None
        figures.append(Figure(f"each {name} in one split", len(train ^ val), len(train | val), bar))
    by_id = {one.segment.id: one.segment for one in kept}
    refs = [(one.segment, by_id.get(one.segment.ref)) for one in kept if one.segment.ref]
    others = defaultdict(set)
    for segment in by_id.values():
        if 3.0 <= segment.end - segment.start <= 10.0:
            others[segment.speaker, segment.split].add(segment.recording)
    good = [
        ref is not None
        and (ref.speaker, ref.split) == (target.speaker, target.split)
        and ref.id != target.id
        and (ref.recording != target.recording or others[target.speaker, target.split] <= {target.recording})
        for target, ref in refs
    ]
    figures.append(Figure("references of the same speaker and split, another recording", sum(good), len(good), 1.0))
    return figures


def faults(heard: Sequence[Heard]) -> list[Figure]:
    """Spoiled segments that are left out; music is for information, where no model looks for it."""
    figures = []
    for fault in ("noise", "clipping", "music"):
        spoiled = [one.segment for one in heard if fault in one.faults]
        figures.append(Figure(f"segments with {fault} left out", sum(not s.keep for s in spoiled), len(spoiled)))
    foreign = [one.segment for one in heard if "german" in one.voices]
    figures.append(Figure("segments in another language left out", sum(not s.keep for s in foreign), len(foreign)))
    return figures


def accounted(prepared: Path, truth: dict[str, Any]) -> Figure:
    """Seconds of the input by fate, against the length of the files."""
    given = json.loads((prepared / ACCOUNTING).read_bytes())
    seconds = sum(value for value in given["fates"].values())
    real = sum(recording["seconds"] for recording in truth["recordings"])
    return Figure("seconds accounted for", round(min(seconds, 2 * real - seconds), 2), round(real, 2), 0.9999)


def measure(prepared: Path, truth_folder: Path) -> list[Figure]:
    """All figures of a prepared folder."""
    truth = json.loads((truth_folder / "truth.json").read_bytes())
    heard = join_truth(read_segments(prepared), truth)
    return [
        *boundaries(heard),
        covered(heard, truth),
        *transcripts(heard),
        duplicates(heard),
        false_duplicates(heard),
        *speakers(heard),
        *leaks(heard),
        *faults(heard),
        accounted(prepared, truth),
    ]


def main() -> None:
    options = tyro.cli(Options)
    figures = measure(options.prepared, options.truth)
    table = Table("figure", "measured", "wanted", "")
    for figure in figures:
        share = (
            "not measured" if figure.share is None else f"{100 * figure.share:.1f} % ({figure.good:g} of {figure.of:g})"
        )
        wanted = f"{100 * figure.bar:g} %" if figure.bar is not None else ""
        table.add_row(figure.name, share, wanted, "MISSED" if figure.misses else figure.note)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) | {"share": figure.share} for figure in figures], indent=1))
    sys.exit(any(figure.misses for figure in figures))


if __name__ == "__main__":
    main()
