"""Bootstrap intervals over utterances; every figure is a ratio of two sums, so one resampling serves them all.

A corpus rate is errors over units; a mean of utterances is values over ones; an utterance without a value has 0 in
both. All figures of all systems are computed on the same resamples, so differences between systems are paired.
Percentile intervals: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

Shapes: N utterances, M figures, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
_CELLS = 4_000_000  # of the table of counts that is in memory at once


@dataclass(frozen=True)
class Resampled:
    """point_M: the figures; n_M: utterances that have a value; ratios_BM: the figures of each resample.

    A figure without any value is NaN.
    """

    point_M: np.ndarray
    n_M: np.ndarray
    ratios_BM: np.ndarray

    def interval(self, figure: int) -> dict[str, float | int] | None:
        """`mean`, `low`, `high`, `n`; None where no utterance has a value."""
        return _interval(self.point_M[figure], self.ratios_BM[:, figure], self.n_M[figure])

    def difference(self, one: int, two: int) -> dict[str, float | int] | None:
        """`one` minus `two`, paired."""
        values_B = self.ratios_BM[:, one] - self.ratios_BM[:, two]
        return _interval(self.point_M[one] - self.point_M[two], values_B, min(self.n_M[one], self.n_M[two]))


def resample(
    numerators_NM: np.ndarray, denominators_NM: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Resampled:
    """Resample utterances with replacement; the same N and seed give the same resamples."""
    count = len(numerators_NM)
    rng = np.random.default_rng(seed)
    parts = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for first in range(0, resamples, rows := max(1, _CELLS // max(count, 1))):
            counts_BN = _counts(rng, min(rows, resamples - first), count)
            parts.append((counts_BN @ numerators_NM) / (counts_BN @ denominators_NM))
        point_M = numerators_NM.sum(0) / denominators_NM.sum(0)
    return Resampled(point_M, (denominators_NM > 0).sum(0), np.concatenate(parts))


def _counts(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """float64 [rows, count]: how often each resample draws each utterance."""
    drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _interval(point: float, values_B: np.ndarray, n: int) -> dict[str, float | int] | None:
    if not np.isfinite(point):
        return None
    finite = values_B[np.isfinite(values_B)]
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if finite.size else (point, point)
    return {"mean": float(point), "low": float(low), "high": float(high), "n": int(n)}
