"""Voices: which segments are of one speaker, and where each stands on the map.

Average linkage by cosine distance, cut at a threshold (scipy). Above `MOST_AT_ONCE` segments it is done in two
steps, within each recording and then between the means of what that found, so that memory stays small.

Shapes: N segments, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

MOST_AT_ONCE = 4000
MOST_COMPARED = 1000  # segments of a histogram of distances
EMBEDDINGS = "embeddings.npy"


def read_embeddings(folder: Path) -> np.ndarray | None:
    """float16 [N, D]: a row for each segment, zero where its voice was not measured; None without voices."""
    try:
        embeddings_ND = np.load(folder / EMBEDDINGS, allow_pickle=False)
    except OSError:
        return None
    return embeddings_ND if embeddings_ND.size else None


def cluster_voices(embeddings_ND: np.ndarray, recordings: Sequence[str], distance: float) -> list[int]:
    """A number for each segment: 0, 1, … in order of first appearance.

    Args:
        embeddings_ND: none is zero. recordings: of each segment. distance: cosine distance up to which voices are one.
    """
    unit_ND = unit_rows(embeddings_ND)
    if len(unit_ND) <= MOST_AT_ONCE:
        return _renumbered(_linked(unit_ND, distance))
    first = np.zeros(len(unit_ND), np.int64)
    of_recording: dict[str, list[int]] = {}
    for at, name in enumerate(recordings):
        of_recording.setdefault(name, []).append(at)
    for members in of_recording.values():
        for begin in range(0, len(members), MOST_AT_ONCE):
            part = members[begin : begin + MOST_AT_ONCE]
            first[part] = first.max() + 1 + _linked(unit_ND[part], distance)
    numbers, inverse = np.unique(first, return_inverse=True)
    means = np.stack([unit_ND[inverse == number].mean(0) for number in range(len(numbers))])
    return _renumbered(_linked(unit_rows(means), distance)[inverse])


def unit_rows(embeddings_ND: np.ndarray) -> np.ndarray:
    """float64 [N, D] of length 1; a zero row stays zero."""
    wide_ND = np.asarray(embeddings_ND, np.float64)
    return wide_ND / np.maximum(np.linalg.norm(wide_ND, axis=1, keepdims=True), 1e-12)


def _linked(unit_ND: np.ndarray, distance: float) -> np.ndarray:
    if len(unit_ND) < 2:
        return np.zeros(len(unit_ND), np.int64)
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    apart_NN = np.clip(1 - unit_ND @ unit_ND.T, 0, 2)
    np.fill_diagonal(apart_NN, 0)
    return fcluster(linkage(squareform(apart_NN, checks=False), "average"), distance, "distance").astype(np.int64)


def _renumbered(labels_N: np.ndarray) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels_N.tolist()]


def voice_distances(embeddings_ND: np.ndarray, speakers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosine distances of pairs of segments, and which pairs are of one speaker: float64 and bool [pairs].

    Of many segments, `MOST_COMPARED` evenly chosen ones.
    """
    every = max(1, -(-len(embeddings_ND) // MOST_COMPARED))
    unit_ND, names = unit_rows(embeddings_ND[::every]), np.array(list(speakers)[::every])
    one, two = np.triu_indices(len(unit_ND), 1)
    return np.clip(1 - (unit_ND @ unit_ND.T)[one, two], 0, 2), names[one] == names[two]


def voice_map(embeddings_ND: np.ndarray) -> list[tuple[float, float]]:
    """x and y of each segment: the two main axes of the embeddings (PCA), four decimals."""
    unit_ND = unit_rows(embeddings_ND)
    if len(unit_ND) < 3:
        return [(float(number), 0.0) for number in range(len(unit_ND))]
    centred_ND = unit_ND - unit_ND.mean(0)
    _, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    axes_D2 = axes_DD[:, -1:-3:-1]
    axes_D2 = axes_D2 * np.sign(axes_D2[np.abs(axes_D2).argmax(0), range(axes_D2.shape[1])])
    x_y_N2 = np.round(centred_ND @ axes_D2, 4) + 0.0
    return [(x, y) for x, y in x_y_N2.tolist()]
