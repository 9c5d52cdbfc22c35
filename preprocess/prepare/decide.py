"""Decides which segments are kept: a pure function of what was measured, the thresholds and people's decisions.

In: segments with their measurements, embeddings, thresholds. Out: the same segments, each kept or with the reason why
not, with speaker, reference and side of the split. No audio is read and no model is run, so it takes seconds.

The steps are those of `STEPS`, in their order; a segment is rejected by the first that it fails. A person's `accept`
overrules every step but those that leave nothing to accept: no segment, no text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from higgs_tune.preprocess.judges.edits import count_edits
from higgs_tune.preprocess.judges.normalisers import Apply, compact
from higgs_tune.preprocess.prepare.config import Thresholds
from higgs_tune.preprocess.prepare.fingerprint import alike, unpack
from higgs_tune.preprocess.prepare.records import Decision, RejectReason, Segment
from higgs_tune.preprocess.prepare.speakers import cluster_voices, voice_map
from higgs_tune.preprocess.prepare.split import assign_references, assign_split

FEWEST_FOR_FENCES = 8  # segments of a language; fewer have no quartiles to speak of
FINAL = ("segment", "text")  # steps that nobody overrules


def decide(
    segments: Sequence[Segment],
    embeddings_ND: np.ndarray | None,
    thresholds: Thresholds,
    decisions: dict[str, Decision],
    language: str,
    normalise: Apply,
) -> list[Segment]:
    """Decide over all segments.

    Args:
        segments: with the measurements and, where there is no usable segment or text, the reject of these steps.
        embeddings_ND: a row a segment, zero where there is none; None: no voices were measured.
        language: the one that is wanted, or empty.
        normalise: makes texts alike before they are compared.
    """
    decided = [_with_decision(segment, decisions.get(segment.id), normalise) for segment in segments]
    fences = pace_fences(decided, thresholds.pace_fences)
    decided = [_checked(segment, thresholds, language, fences) for segment in decided]
    decided = [_reviewed(segment) for segment in decided]
    decided = _without_duplicates(decided, thresholds)
    decided = _with_speakers(decided, embeddings_ND, thresholds)
    decided = _without_same_texts(decided, thresholds, normalise)
    decided = [replace(segment, keep=segment.reject is None) for segment in decided]
    return assign_references(assign_split(decided, thresholds, normalise), thresholds)


def error_rate(text: str, heard: str, normalise: Apply) -> float:
    """Character error rate of what was heard against a text, four decimals."""
    return round(count_edits(compact(text, normalise), compact(heard, normalise)).rate, 4)


def pace(segment: Segment, text: str) -> float | None:
    """Seconds a character, without spaces."""
    characters = len("".join(text.split()))
    return round(segment.milliseconds / 1000 / characters, 5) if characters else None


def _with_decision(segment: Segment, decision: Decision | None, normalise: Apply) -> Segment:
    """The segment with a person's text and speaker; what depends on the text is computed anew."""
    fresh = replace(segment, keep=False, duplicate_of=None, ref=None, split=None, decision=decision)
    fresh = replace(fresh, reject=segment.reject if segment.reject and segment.reject.step in FINAL else None)
    if decision is None or decision.text is None:
        return fresh
    reject = None if fresh.reject and fresh.reject.step == "text" else fresh.reject
    cer = error_rate(decision.text, segment.asr_text, normalise) if segment.asr_text is not None else None
    slow = pace(segment, decision.text)
    return replace(fresh, text=decision.text, cer=cer, seconds_per_char=slow, reject=reject)


def pace_fences(segments: Sequence[Segment], ranges: float) -> dict[str | None, tuple[float, float]]:
    """By language: smallest and largest seconds a character (J. Tukey's fences); none where segments are few."""
    by_language: dict[str | None, list[float]] = {}
    for segment in segments:
        if segment.reject is None and segment.seconds_per_char is not None:
            by_language.setdefault(segment.language, []).append(segment.seconds_per_char)
    fences: dict[str | None, tuple[float, float]] = {}
    for language, values in by_language.items():
        if len(values) >= FEWEST_FOR_FENCES and ranges:
            low, high = np.percentile(values, (25, 75))
            reach = ranges * (high - low)
            fences[language] = round(float(low - reach), 5), round(float(high + reach), 5)
    return fences


def _checked(
    segment: Segment, limits: Thresholds, language: str, fences: dict[str | None, tuple[float, float]]
) -> Segment:
    """The segment with the first bound that it misses."""
    if segment.reject is not None:
        return segment
    fastest, slowest = fences.get(segment.language) or (None, None)
    said, least = segment.language_probability, limits.min_language_probability
    other = bool(language and segment.language and segment.language != language)
    checks: tuple[tuple[str, str, float | str | None, float | str | None, bool], ...] = (
        ("quality", "low_quality", segment.quality, limits.min_quality, _below(segment.quality, limits.min_quality)),
        ("snr", "noise", segment.snr, limits.min_snr, _below(segment.snr, limits.min_snr)),
        ("clipping", "clipped", segment.clipping, limits.max_clipping, _below(limits.max_clipping, segment.clipping)),
        ("sound", "unwanted_sound", segment.sound, limits.max_sound, _below(limits.max_sound, segment.sound)),
        ("pace", "too_fast", segment.seconds_per_char, fastest, _below(segment.seconds_per_char, fastest)),
        ("pace", "too_slow", segment.seconds_per_char, slowest, _below(slowest, segment.seconds_per_char)),
        ("language", "other_language", segment.language, language, other),
        ("language", "uncertain_language", said, least, _below(said, least)),
        ("agreement", "disagreement", segment.cer, limits.max_cer, _below(limits.max_cer, segment.cer)),
    )
    for step, reason, value, bound, missed in checks:
        if missed:
            return replace(segment, reject=RejectReason(step, reason, value, bound))
    return segment


def _below(one: float | None, two: float | None) -> bool:
    """Whether both are known, and the first is smaller."""
    return one is not None and two is not None and one < two


def _reviewed(segment: Segment) -> Segment:
    """The segment after a person's verdict."""
    verdict = segment.decision.verdict if segment.decision else None
    if verdict == "reject" and segment.reject is None:
        return replace(segment, reject=RejectReason("review", "rejected_by_a_person"))
    if verdict == "accept" and segment.reject is not None and segment.reject.step not in FINAL:
        return replace(segment, reject=None)
    return segment


# several segments


def _rank(segment: Segment) -> tuple[bool, float, float, float, str]:
    """What makes a segment the one that is kept of several: smaller is better."""
    accepted = segment.decision is not None and segment.decision.verdict == "accept"
    cer = segment.cer if segment.cer is not None else 1.0
    return not accepted, -(segment.quality or 0.0), cer, -(segment.snr or 0.0), segment.id


def _without_duplicates(segments: list[Segment], limits: Thresholds) -> list[Segment]:
    """The best of all segments with one sound stays."""
    if not limits.max_duplicate_distance:
        return segments
    numbers = [i for i, one in enumerate(segments) if one.reject is None and one.fingerprint]
    pairs = alike([unpack(segments[i].fingerprint or "") for i in numbers], limits.max_duplicate_distance)
    partners: dict[int, set[int]] = {}
    for one, two in pairs:
        partners.setdefault(numbers[one], set()).add(numbers[two])
        partners.setdefault(numbers[two], set()).add(numbers[one])
    changed = list(segments)
    for number in sorted(partners, key=lambda i: _rank(segments[i])):
        if changed[number].reject is None:
            for other in partners[number]:
                if changed[other].reject is None:
                    changed[other] = _duplicate(segments[other], segments[number], "same_audio")
    return changed


def _duplicate(segment: Segment, kept: Segment, reason: str) -> Segment:
    return replace(segment, duplicate_of=kept.id, reject=RejectReason("duplicate", reason, kept.id))


def _without_same_texts(segments: list[Segment], limits: Thresholds, normalise: Apply) -> list[Segment]:
    """At most `max_same_text` segments of a speaker with one text."""
    if not limits.max_same_text:
        return segments
    by_text: dict[tuple[str | None, str], list[int]] = {}
    for number, segment in enumerate(segments):
        if segment.reject is None:
            by_text.setdefault((segment.speaker, compact(segment.text or "", normalise)), []).append(number)
    changed = list(segments)
    for same in by_text.values():
        best = sorted(same, key=lambda i: _rank(segments[i]))
        for number in best[limits.max_same_text :]:
            changed[number] = _duplicate(segments[number], segments[best[0]], "same_text")
    return changed


def _with_speakers(segments: list[Segment], embeddings_ND: np.ndarray | None, limits: Thresholds) -> list[Segment]:
    """Names of clusters where voices were measured and nobody named the speaker; a person's names last."""
    changed = list(segments)
    if embeddings_ND is not None:
        measured = np.flatnonzero(np.abs(embeddings_ND).sum(1) > 0).tolist()
        for number, place in zip(measured, voice_map(embeddings_ND[measured]), strict=True):
            changed[number] = replace(changed[number], embedding_map=place)
        numbers = [i for i in measured if changed[i].reject is None and not changed[i].speaker]
        recordings = [changed[i].recording for i in numbers]
        labels = cluster_voices(embeddings_ND[numbers], recordings, limits.speaker_distance) if numbers else []
        names = _people_names([changed[i] for i in numbers], labels)
        for number, label in zip(numbers, labels, strict=True):
            changed[number] = replace(changed[number], speaker=names.get(label, f"speaker-{label + 1:03d}"))
    for number, segment in enumerate(changed):
        if segment.decision and segment.decision.speaker:
            changed[number] = replace(segment, speaker=segment.decision.speaker)
        if segment.reject is None and not changed[number].speaker:
            changed[number] = replace(segment, reject=RejectReason("speaker", "no_voice"))
    return changed


def _people_names(segments: Sequence[Segment], labels: Sequence[int]) -> dict[int, str]:
    """The name that people gave to more than half of a cluster's segments: what joins it later is that voice, too."""
    given: dict[int, Counter[str]] = {}
    for segment, label in zip(segments, labels, strict=True):
        if segment.decision and segment.decision.speaker:
            given.setdefault(label, Counter())[segment.decision.speaker] += 1
    sizes = Counter(labels)
    first = {label: names.most_common(1)[0] for label, names in given.items()}
    return {label: name for label, (name, count) in first.items() if 2 * count > sizes[label]}


def counts_by_step(segments: Sequence[Segment]) -> Counter[str]:
    """Segments by the step that rejected them; those that are kept under `kept`."""
    return Counter(segment.reject.step if segment.reject else "kept" for segment in segments)
