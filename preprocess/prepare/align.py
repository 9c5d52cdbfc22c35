"""Which words of a long transcript are said in which segment.

Two ways: by what a recogniser heard in each segment (edit distance of characters, `divide_text`); then, with a CTC
recogniser, by its probabilities (Viterbi, `forced_alignment`; A. Graves et al., Connectionist Temporal Classification,
ICML 2006; the best path instead of the sum over paths), in windows of a few segments that the first way found.

Shapes: T frames, V symbols, N tokens of the text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from higgs_tune.preprocess.judges.edits import levenshtein
from higgs_tune.preprocess.judges.normalisers import Apply, compact

SENTENCE_END = re.compile(r"[.!?؟。！？…]['\"”»)]*$")
WINDOW_FRAMES = 3000  # of 20 ms: about a minute
UNSPOKEN_WORDS = 3  # a sentence of so many words, none of which was heard, is taken to be unspoken


def divide_text(words: Sequence[str], heard: Sequence[str], normalise: Apply) -> list[list[int]]:
    """The numbers of the words that are said in each segment.

    Words that were not heard stay with the words before them, but for whole sentences of `UNSPOKEN_WORDS` words or
    more: they are in the text and not in the recording, and belong to no segment.

    Args:
        words: of the transcript. heard: a text for each segment.
        normalise: makes both alike.
    """
    text, owner_of = "", list[int]()
    for number, word in enumerate(words):
        plain = compact(word, normalise)
        text += plain
        owner_of += [number] * len(plain)
    said = [compact(part, normalise) for part in heard]
    starts = np.cumsum([0, *map(len, said)])
    places, matched = _places(text, "".join(said))
    by_word: list[list[int]] = [[] for _ in words]
    hits = [0] * len(words)
    for at, owner in enumerate(owner_of):
        by_word[owner].append(places[at])
        hits[owner] += matched[at]
    unspoken = _unspoken(words, hits)
    divided: list[list[int]] = [[] for _ in heard]
    segment = 0
    for number in range(len(words)):
        if by_word[number] and hits[number]:
            middle = by_word[number][len(by_word[number]) // 2]
            segment = max(segment, int(np.searchsorted(starts, middle, side="right")) - 1)
        if number not in unspoken and heard:
            divided[min(segment, len(heard) - 1)].append(number)
    return divided


def _places(text: str, said: str) -> tuple[list[int], list[bool]]:
    """For each character of the text: the character that was heard in its place, and whether one was."""
    places, matched = [0] * len(text), [False] * len(text)
    for run in levenshtein().opcodes(text, said):
        for step in range(run.src_end - run.src_start):
            has = run.tag in ("equal", "replace")
            places[run.src_start + step] = run.dest_start + (step if has else 0)
            matched[run.src_start + step] = has
    return places, matched


def _unspoken(words: Sequence[str], hits: Sequence[int]) -> set[int]:
    """The words of sentences of which nothing was heard."""
    found: set[int] = set()
    begin = 0
    for number, word in enumerate(words):
        if SENTENCE_END.search(word) or number == len(words) - 1:
            if number + 1 - begin >= UNSPOKEN_WORDS and not any(hits[begin : number + 1]):
                found |= set(range(begin, number + 1))
            begin = number + 1
    return found


def forced_alignment(log_probs_TV: np.ndarray, tokens_N: Sequence[int], blank: int) -> list[tuple[int, int]] | None:
    """The likeliest frames of each token: (first, last + 1); None where the frames are too few for the tokens.

    Args:
        log_probs_TV: a CTC recogniser's log probabilities.
    """
    frames, count = len(log_probs_TV), len(tokens_N)
    if not count:
        return []
    labels_L = np.full(2 * count + 1, blank)
    labels_L[1::2] = tokens_N
    repeats = sum(one == two for one, two in pairwise(tokens_N))
    if frames < count + repeats:
        return None
    may_skip_L = np.zeros(len(labels_L), np.bool_)  # over the blank before a token that differs from the last one
    may_skip_L[3::2] = labels_L[3::2] != labels_L[1:-2:2]
    score_L = np.full(len(labels_L), -np.inf)
    score_L[:2] = log_probs_TV[0, labels_L[:2]]
    steps_TL = np.zeros((frames, len(labels_L)), np.uint8)
    for frame in range(1, frames):
        one_L, two_L = np.full_like(score_L, -np.inf), np.full_like(score_L, -np.inf)
        one_L[1:] = score_L[:-1]
        two_L[2:] = np.where(may_skip_L[2:], score_L[:-2], -np.inf)
        choices_3L = np.stack([score_L, one_L, two_L])
        step_L = choices_3L.argmax(0)
        steps_TL[frame] = step_L
        score_L = np.take_along_axis(choices_3L, step_L[None], 0)[0] + log_probs_TV[frame, labels_L]
    at = len(labels_L) - 1 if score_L[-1] >= score_L[-2] else len(labels_L) - 2
    spans = [[frames, 0] for _ in range(count)]
    for frame in range(frames - 1, -1, -1):
        if at % 2:
            span = spans[at // 2]
            span[0], span[1] = min(span[0], frame), max(span[1], frame + 1)
        at -= int(steps_TL[frame, at])
    return [(begin, end) for begin, end in spans]


@dataclass(frozen=True)
class Symbols:
    """A CTC recogniser's symbols: those of each word (perhaps none), blank, and the one between words or None."""

    of_word: Sequence[Sequence[int]]
    blank: int
    between: int | None


def realign(
    divided: Sequence[Sequence[int]], log_probs: Callable[[int], np.ndarray], symbols: Symbols
) -> list[list[int]]:
    """Words by segment, moved to where a CTC recogniser places them.

    Args:
        divided: numbers of the words of each segment, by `divide_text`; words that are in none stay out.
        log_probs: of a segment, float [T, V]; each is asked for in order, some twice.
    """
    order = [word for part in divided for word in part]
    ends = np.cumsum([len(part) for part in divided]).tolist()
    made: list[list[int]] = [[] for _ in divided]
    start = taken = 0
    while start < len(divided):
        rows, end = [log_probs(start)], start + 1
        while end < len(divided) and (len(rows) < 2 or sum(map(len, rows)) < WINDOW_FRAMES):
            rows.append(log_probs(end))
            end += 1
        words = order[taken : ends[end - 1]]
        owners = _owners(words, rows, symbols)
        if owners is None:  # the window keeps its division
            owners = [max(0, bisect_right(ends, taken + number) - start) for number in range(len(words))]
        last = end - start - (end < len(divided))  # the last segment is aligned with those after it
        for word, owner in zip(words, owners, strict=True):
            if owner < last:
                made[start + owner].append(word)
                taken += 1
        start = end if end == len(divided) else end - 1
    return made


def _owners(words: Sequence[int], rows: Sequence[np.ndarray], symbols: Symbols) -> list[int] | None:
    """The segment of a window that each word is said in, in order; None where they do not fit."""
    tokens, spans_of = list[int](), list[tuple[int, int]]()
    for word in words:
        if tokens and symbols.between is not None and symbols.of_word[word]:
            tokens.append(symbols.between)
        spans_of.append((len(tokens), len(tokens) + len(symbols.of_word[word])))
        tokens += symbols.of_word[word]
    frames = forced_alignment(np.concatenate(rows), tokens, symbols.blank)
    if frames is None:
        return None
    edges = np.cumsum([len(row) for row in rows])
    owners, owner = [], 0
    for begin, end in spans_of:
        if end > begin:
            middle = (frames[begin][0] + frames[end - 1][1]) / 2
            owner = max(owner, min(int(np.searchsorted(edges, middle, side="right")), len(rows) - 1))
        owners.append(owner)
    return owners
