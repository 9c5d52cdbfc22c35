"""Cuts a recording into segments, in pauses and never in a word; a pure function of what was heard in the first pass.

In: probabilities or levels, and the places where the transcript can be divided. Out: segments, and stretches of speech
that are none: too short to stand alone, or too long without a pause. What is in neither is silence.

The cuts are those of the least cost (a shortest path over the stretches of speech): speech that is lost costs most,
then short pauses as cuts, then long pauses within a segment.

Times are milliseconds. Shapes: F windows of 32 ms, L windows of 10 ms.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from higgs_tune.preprocess.prepare.listen import LEVEL, WINDOW, Listened
from higgs_tune.preprocess.prepare.reading import RATE_HZ

WINDOW_MS, LEVEL_MS = WINDOW * 1000 // RATE_HZ, LEVEL * 1000 // RATE_HZ
HYSTERESIS = 0.15  # speech ends where the probability falls this far below the threshold
SHORTEST_SPEECH_MS, SHORTEST_GAP_MS = 100, 60
EDGE_MS, FAR_EDGE_MS = 160, 400  # how far the level may move an edge; and where there is no pause so near
SOFT_DB, SOFT_MS = 20.0, 100  # a consonant that begins a word: it may be so far below the vowels, and lasts so long
FLOOR_SHARE, SPEECH_SHARE = 10, 90  # percentiles of levels that stand for noise and speech
NOTHING_DB, QUIET_ROOM_DB = -120.0, 50.0
LEAST_RANGE_DB = 6.0  # a recording with less between noise and speech has no speech by its loudness
LOST, CUT, SHORT_CUT, LONG_GAP = 20.0, 0.3, 2.0, 1.0  # costs, by seconds; see `_cost`
GOOD_CUT_S = 0.5
CUE_SLACK_MS = 300  # a cut may be this far from the boundary of a cue


class Span(NamedTuple):
    """From `start` to before `end`, in milliseconds."""

    start: int
    end: int


@dataclass(frozen=True)
class Cutting:
    """Lengths in milliseconds; see the options of the same names."""

    min_ms: int
    max_ms: int
    min_pause_ms: int
    max_pause_ms: int
    pad_ms: int
    vad_threshold: float


@dataclass(frozen=True)
class Cuts:
    """Segments, and the speech that is in none; together they do not overlap. Both in order."""

    segments: list[Span]
    too_short: list[Span]
    no_pause: list[Span]


def cut_recording(
    heard: Listened,
    total_ms: int,
    cutting: Cutting,
    boundaries_ms: Sequence[int] | None = None,
    turns_ms: Sequence[int] = (),
) -> Cuts:
    """The segments of a recording.

    Args:
        boundaries_ms: where the transcript may be divided, in order; None: anywhere.
        turns_ms: where another speaker begins, in order; pauses there are in no segment.
    """
    spans = find_speech(heard, total_ms, cutting.vad_threshold)
    pieces = _pieces(spans, cutting, boundaries_ms)
    segments, too_short, no_pause = [], [], []
    for group in _group(pieces, cutting, turns_ms):
        length = group.end - group.start
        kind = no_pause if length > cutting.max_ms else too_short if length < cutting.min_ms else segments
        kind.append(group)
    padded = _pad(sorted([*segments, *too_short, *no_pause]), cutting.pad_ms, total_ms)
    return Cuts(*([padded[span] for span in kind] for kind in (segments, too_short, no_pause)))


# speech


def find_speech(heard: Listened, total_ms: int, threshold: float) -> list[Span]:
    """Stretches of speech between pauses of at least `SHORTEST_GAP_MS`."""
    decibels_L = heard.levels_L.astype(np.float32) / -2
    if not len(decibels_L):
        return []
    if len(heard.probs_F):
        windows = _hysteresis(heard.probs_F / 255.0, threshold, max(threshold - HYSTERESIS, 0.01))
        spans = [Span(begin * WINDOW_MS, end * WINDOW_MS) for begin, end in windows]
        smooth_L = _smoothed(decibels_L)
        spans = [_sharpened(span, smooth_L) for span in spans]
    else:
        spans = _loud(decibels_L)
    spans = [Span(max(0, s.start), min(s.end, total_ms)) for s in spans]
    return [span for span in _joined(spans) if span.end - span.start >= SHORTEST_SPEECH_MS]


def _hysteresis(values: np.ndarray, enter: float, leave: float) -> list[tuple[int, int]]:
    """Runs above `leave` that somewhere reach `enter`."""
    above = np.concatenate([[0], (values >= leave).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(above)).reshape(-1, 2)
    reached = np.concatenate([[0], np.cumsum(values >= enter)])
    return [(int(begin), int(end)) for begin, end in edges if reached[end] > reached[begin]]


def _smoothed(decibels_L: np.ndarray) -> np.ndarray:
    """Means over three windows: the level of noise swings from one to the next."""
    return np.convolve(np.pad(decibels_L, 1, mode="edge"), np.ones(3) / 3, mode="valid")


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if joined and span.start - joined[-1].end < SHORTEST_GAP_MS:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return joined


def _sharpened(span: Span, decibels_L: np.ndarray) -> Span:
    """The span with its edges where the level rises from that of the pause, within `EDGE_MS`, or `FAR_EDGE_MS`.

    Where noise or music before it would hide a soft consonant, it begins by the length of one earlier.
    """
    begin, end = span.start // LEVEL_MS, span.end // LEVEL_MS
    inside_L = decibels_L[begin:end]
    if not len(inside_L):
        return span
    loud = float(np.percentile(inside_L, SPEECH_SHARE))
    start = _edge(decibels_L, begin, loud)
    stop = len(decibels_L) - _edge(decibels_L[::-1], len(decibels_L) - end, loud)
    before_L = decibels_L[max(0, start - FAR_EDGE_MS // LEVEL_MS) : start]
    if len(before_L) and loud - float(np.percentile(before_L, FLOOR_SHARE)) < SOFT_DB:
        start = max(0, start - SOFT_MS // LEVEL_MS)
    return Span(start * LEVEL_MS, stop * LEVEL_MS) if stop > start else span


def _edge(levels_L: np.ndarray, begin: int, loud: float) -> int:
    """The first window of speech that was found to begin at `begin`; it is looked for farther away if need be."""
    edge = begin
    for reach in (EDGE_MS // LEVEL_MS, FAR_EDGE_MS // LEVEL_MS):
        first = max(0, begin - reach)
        found = _first_above(levels_L[first : begin + reach], loud)
        if found or (found == 0 and not first):
            return first + found
        if found == 0:
            edge = max(0, begin - EDGE_MS // LEVEL_MS)
    return edge


def _first_above(levels_L: np.ndarray, loud: float) -> int | None:
    """The first window that is a third of the way from the quietest level to the loud one; None: no level is quiet."""
    quiet = float(levels_L.min(initial=loud))
    if loud - quiet < LEAST_RANGE_DB:
        return None
    above = np.flatnonzero(levels_L > quiet + (loud - quiet) / 3)
    return int(above[0]) if len(above) else None


def _loud(decibels_L: np.ndarray) -> list[Span]:
    """Speech by loudness: runs that reach the middle between the levels of pauses and of speech, and what adjoins them.

    Silence of zeros counts as a room that is `QUIET_ROOM_DB` below the speech.
    """
    audible_L = decibels_L[decibels_L > NOTHING_DB]
    if not len(audible_L):
        return []
    loud = float(np.percentile(audible_L, SPEECH_SHARE))
    floored_L = np.maximum(decibels_L, loud - QUIET_ROOM_DB)
    quiet = float(np.percentile(floored_L, FLOOR_SHARE))
    if loud - quiet < LEAST_RANGE_DB and len(audible_L) > 0.99 * len(decibels_L):
        return []
    quiet = min(quiet, loud - 3 * LEAST_RANGE_DB)
    windows = _hysteresis(_smoothed(floored_L), quiet + (loud - quiet) * 0.5, quiet + (loud - quiet) * 0.25)
    return [Span(begin * LEVEL_MS, end * LEVEL_MS) for begin, end in windows]


# cuts


def _pieces(spans: list[Span], cutting: Cutting, boundaries_ms: Sequence[int] | None) -> list[Span]:
    """Speech that stays together: it is divided in pauses of `min_pause` where the transcript may be divided.

    A piece that is longer than a segment is divided in its shorter pauses.
    """
    pieces: list[list[Span]] = []
    for span in spans:
        gap = Span(pieces[-1][-1].end, span.start) if pieces else Span(-1, -1)
        if pieces and not (gap.end - gap.start >= cutting.min_pause_ms and _divides(gap, boundaries_ms)):
            pieces[-1].append(span)
        else:
            pieces.append([span])
    divided = [part for piece in pieces for part in _divide(piece, cutting.max_ms, boundaries_ms)]
    return [Span(part[0].start, part[-1].end) for part in divided]


def _divides(gap: Span, boundaries_ms: Sequence[int] | None) -> bool:
    if boundaries_ms is None:
        return True
    at = bisect.bisect_left(boundaries_ms, gap.start - CUE_SLACK_MS)
    return at < len(boundaries_ms) and boundaries_ms[at] <= gap.end + CUE_SLACK_MS


def _divide(piece: list[Span], max_ms: int, boundaries_ms: Sequence[int] | None) -> list[list[Span]]:
    """Cut a piece in its longest pause until each part is short enough, or has no pause."""
    waiting, done = [piece], list[list[Span]]()
    while waiting:
        part = waiting.pop()
        gaps = [] if part[-1].end - part[0].start <= max_ms else [
            (two.start - one.end, -number)
            for number, (one, two) in enumerate(pairwise(part), 1)
            if _divides(Span(one.end, two.start), boundaries_ms)
        ]  # fmt: skip
        if gaps:
            number = -max(gaps)[1]
            waiting += [part[number:], part[:number]]
        else:
            done.append(part)
    return done


def _group(pieces: list[Span], cutting: Cutting, turns_ms: Sequence[int]) -> list[Span]:
    """Neighbouring pieces as segments, by a shortest path from the first piece to the end."""
    best, choice = [0.0] * (len(pieces) + 1), [0] * (len(pieces) + 1)
    for end in range(1, len(pieces) + 1):
        best[end] = float("inf")
        inside = 0.0
        for begin in range(end - 1, -1, -1):
            if begin < end - 1:
                gap = Span(pieces[begin].end, pieces[begin + 1].start)
                inside += LONG_GAP * (gap.end - gap.start) / 1000
                too_long = pieces[end - 1].end - pieces[begin].start > cutting.max_ms
                if too_long or gap.end - gap.start > cutting.max_pause_ms or (turns_ms and _divides(gap, turns_ms)):
                    break
            before = pieces[begin].start - pieces[begin - 1].end if begin else None
            cost = best[begin] + inside + _cost(Span(pieces[begin].start, pieces[end - 1].end), before, cutting)
            if cost < best[end]:
                best[end], choice[end] = cost, begin
    groups, end = [], len(pieces)
    while end:
        groups.append(Span(pieces[choice[end]].start, pieces[end - 1].end))
        end = choice[end]
    return groups[::-1]


def _cost(span: Span, gap_before_ms: int | None, cutting: Cutting) -> float:
    seconds = (span.end - span.start) / 1000
    lost = LOST * (1 + seconds) if not cutting.min_ms <= span.end - span.start <= cutting.max_ms else 0.0
    short = 0.0 if gap_before_ms is None else SHORT_CUT * max(0.0, GOOD_CUT_S - gap_before_ms / 1000)
    return lost + CUT + short


def _pad(spans: list[Span], pad_ms: int, total_ms: int) -> dict[Span, Span]:
    """Each span with up to `pad_ms` of the pauses around it, at most half of them."""
    padded: dict[Span, Span] = {}
    for number, span in enumerate(spans):
        before = (span.start - spans[number - 1].end) // 2 if number else span.start
        after = (spans[number + 1].start - span.end) // 2 if number + 1 < len(spans) else total_ms - span.end
        padded[span] = Span(span.start - min(pad_ms, max(before, 0)), span.end + min(pad_ms, max(after, 0)))
    return padded
