"""The two sides of the split, and the reference of each kept segment.

Speakers that share a recording are on one side, with all of their recordings; a text that is said on both sides stays
on the side of training alone. One speaker alone is split by recordings. The choice is a hash of names and `seed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import xxhash
from higgs_tune.preprocess.judges.normalisers import Apply, compact
from higgs_tune.preprocess.prepare.config import Thresholds
from higgs_tune.preprocess.prepare.records import RejectReason, Segment

BEST = 8  # references that are chosen among, of a speaker and a target
MOST_OVER = 2.0  # a group is not held out if that would hold out this many times what is wanted


def assign_split(segments: list[Segment], limits: Thresholds, normalise: Apply) -> list[Segment]:
    """The kept segments with their side; what would stand on both sides is rejected."""
    kept = [segment for segment in segments if segment.keep]
    held_out = _held_out(_groups(kept), limits)
    sided = [
        replace(segment, split="val" if segment.id in held_out else "train") if segment.keep else segment
        for segment in segments
    ]
    texts = {compact(segment.text or "", normalise): segment.id for segment in sided if segment.split == "train"}
    return [_refuse_text(segment, texts, normalise) if segment.split == "val" else segment for segment in sided]


def _refuse_text(segment: Segment, texts: dict[str, str], normalise: Apply) -> Segment:
    other = texts.get(compact(segment.text or "", normalise))
    if other is None:
        return segment
    reject = RejectReason("duplicate", "text_on_both_sides", other)
    return replace(segment, keep=False, split=None, duplicate_of=other, reject=reject)


def _groups(kept: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that are linked by speaker or recording; by recording alone where there is one speaker."""
    by_speaker = len({segment.speaker for segment in kept}) > 1
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for segment in kept:
        recording = f"recording {segment.sha256}"
        first, second = sorted((find(recording), find(f"speaker {segment.speaker}" if by_speaker else recording)))
        root[second] = first
    groups: dict[str, list[Segment]] = {}
    for segment in kept:
        groups.setdefault(find(f"recording {segment.sha256}"), []).append(segment)
    return list(groups.values())


def _held_out(groups: list[list[Segment]], limits: Thresholds) -> set[str]:
    """Ids of the held-out segments: whole groups, at least one and never all where there are two."""
    if not limits.val_fraction or len(groups) < 2:
        return set()
    lengths = [sum(segment.milliseconds for segment in group) for group in groups]
    wanted = limits.val_fraction * sum(lengths)
    names = [min(segment.id for segment in group) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: _hash(f"split {limits.seed} {names[i]}"))
    chosen: list[int] = []
    for number in order:
        so_far = sum(lengths[i] for i in chosen)
        if so_far < wanted and so_far + lengths[number] <= MOST_OVER * wanted:
            chosen.append(number)
    chosen = chosen or [min(order, key=lambda i: lengths[i])]
    return {segment.id for number in chosen for segment in groups[number]}


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))


def assign_references(segments: list[Segment], limits: Thresholds) -> list[Segment]:
    """Each kept segment with a clean one of its speaker as reference: of another recording where there is one."""
    by_speaker: dict[str | None, list[Segment]] = {}
    for segment in segments:
        seconds = segment.milliseconds / 1000
        if segment.keep and limits.ref_min_seconds <= seconds <= limits.ref_max_seconds:
            by_speaker.setdefault(segment.speaker, []).append(segment)
    best = {speaker: sorted(fit, key=_cleanliness) for speaker, fit in by_speaker.items()}
    return [
        replace(segment, ref=_reference(segment, best.get(segment.speaker, []), limits.seed))
        if segment.keep
        else segment
        for segment in segments
    ]


def _cleanliness(segment: Segment) -> tuple[float, float, float, str]:
    cer = segment.cer if segment.cer is not None else 1.0
    return -(segment.quality or 0.0), -(segment.snr or 0.0), cer, segment.id


def _reference(segment: Segment, candidates: Sequence[Segment], seed: int) -> str | None:
    """One of the cleanest candidates on the segment's side, by a hash; None where there is none but itself."""
    same_side = (one for one in candidates if one.id != segment.id and one.split == segment.split)
    others, own = list[Segment](), list[Segment]()
    for one in same_side:
        pool = own if one.sha256 == segment.sha256 else others
        if len(pool) < BEST:
            pool.append(one)
        if len(others) == BEST:
            break
    chosen = others or own
    return chosen[_hash(f"reference {seed} {segment.id}") % len(chosen)].id if chosen else None
