"""Fingerprints of audio, and which of many are of the same recording.

A fingerprint holds, for each window of 256 ms, 64 ms apart, 16 bits: whether the difference of the energies of two
neighbouring bands grew since the window before (J. Haitsma, T. Kalker: A Highly Robust Audio Fingerprinting System,
ISMIR 2002). Gain changes no bit; a shift by a part of a window changes few. Two fingerprints are compared at the shifts
at which they share exact pieces, so the cost does not grow with the square of their number.

Shapes: S samples, W windows.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from higgs_tune.preprocess.prepare.reading import RATE_HZ
from higgs_tune.shards.errors import UserError

WINDOW_S, HOP_S = 0.256, 0.064
BANDS, LOWEST_HZ, HIGHEST_HZ = 17, 300.0, 3400.0
APART = 4  # windows between the two halves of a piece that is looked up
MOST_IN_PLACE = 64  # a piece that more segments share is silence or a jingle: it is not looked up
LEAST_OVERLAP = 0.6  # of the shorter of two segments
SHIFTS_TRIED = 3  # on either side of a shift that was found


def fingerprint(mono_S: np.ndarray) -> str:
    """The fingerprint of samples at 16 kHz, base64 of two bytes a window; empty for less than two windows."""
    window, hop = int(WINDOW_S * RATE_HZ), int(HOP_S * RATE_HZ)
    if len(mono_S) < window + hop:
        return ""
    frames_WS = np.lib.stride_tricks.sliding_window_view(mono_S, window)[::hop] * np.hanning(window).astype(np.float32)
    power_WF = np.abs(np.fft.rfft(frames_WS, axis=1)) ** 2
    edges = np.geomspace(LOWEST_HZ, HIGHEST_HZ, BANDS + 1) * window / RATE_HZ
    bands = [power_WF[:, int(low) : max(int(low) + 1, int(high))].sum(1) for low, high in pairwise(edges)]
    energy_WB = np.stack(bands, axis=1)
    slope_WB = np.diff(energy_WB, axis=1)
    bits_WB = np.diff(slope_WB, axis=0) > 0
    return base64.b64encode(np.packbits(bits_WB, axis=1).tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """uint16 [W].

    Raises:
        UserError: it is no fingerprint.
    """
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), ">u2").astype(np.uint16)
    except ValueError as error:
        raise UserError(f"no fingerprint: {error}", got=f"{text:.40}") from error


def distance(one_W: np.ndarray, two_W: np.ndarray, shift: int) -> float:
    """Share of differing bits, window `i` of one against `i - shift` of two; 1 where too little overlaps.

    It is that of the worse half: two segments that share a phrase only are not alike.
    """
    begin, end = max(0, shift), min(len(one_W), len(two_W) + shift)
    if end - begin < max(1, LEAST_OVERLAP * min(len(one_W), len(two_W))):
        return 1.0
    differing = np.bitwise_xor(one_W[begin:end], two_W[begin - shift : end - shift])
    counts_W, middle = np.bitwise_count(differing), len(differing) // 2
    return max(float(half_W.mean()) / 16 for half_W in (counts_W[:middle], counts_W[middle:]) if len(half_W))


def alike(prints: Sequence[np.ndarray], most: float) -> list[tuple[int, int]]:
    """Pairs of numbers of fingerprints that differ in at most the share `most` of their bits, smaller number first."""
    votes = _shared_pieces(prints)
    found: set[tuple[int, int]] = set()
    for one, two, shift in votes:
        if (one, two) not in found:
            tried = range(shift - SHIFTS_TRIED, shift + SHIFTS_TRIED + 1)
            if min(distance(prints[one], prints[two], by) for by in tried) <= most:
                found.add((one, two))
    return sorted(found)


def _shared_pieces(prints: Sequence[np.ndarray]) -> list[tuple[int, int, int]]:
    """(one, two, shift) wherever two fingerprints share a piece of 32 bits; each triple once."""
    sizes = [max(0, len(print_W) - APART) for print_W in prints]
    if not sum(sizes):
        return []
    owners = np.repeat(np.arange(len(prints)), sizes)
    places = np.concatenate([np.arange(size) for size in sizes])
    pieces = np.concatenate([_pieces(print_W) for print_W in prints])
    order = np.argsort(pieces, kind="stable")
    owners, places, pieces = owners[order], places[order], pieces[order]
    edges = np.flatnonzero(np.concatenate([[True], pieces[1:] != pieces[:-1], [True]]))
    triples: set[tuple[int, int, int]] = set()
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if 1 < end - begin <= MOST_IN_PLACE:
            group = list(zip(owners[begin:end].tolist(), places[begin:end].tolist(), strict=True))
            for number, (one, at) in enumerate(group):
                triples |= {(one, two, at - other) for two, other in group[number + 1 :] if two != one}
    return sorted(triples)


def _pieces(print_W: np.ndarray) -> np.ndarray:
    """uint32: each window's bits with those of the window `APART` later."""
    if len(print_W) <= APART:
        return np.zeros(0, np.uint32)
    return (print_W[:-APART].astype(np.uint32) << 16) | print_W[APART:]
