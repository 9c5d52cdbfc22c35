"""What each threshold does: the distribution that it cuts, the segments at its edge, and what another value would keep.

In: segments and the options. Out: numbers for the report; nothing is measured or decided here.

Costs count the segments that miss this threshold alone; the others of the funnel, as far as they are known, pass.
Guarantees: the cost of another value is what a decision with that value keeps, but for duplicates and splits, which are
only known of segments that passed (tests/test_prepare_report.py).

Shapes: N segments, B bins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from higgs_tune.preprocess.prepare.config import PrepareConfig
from higgs_tune.preprocess.prepare.decide import FINAL, pace_fences
from higgs_tune.preprocess.prepare.records import Segment

BINS = 40
EDGE_SEGMENTS = 3  # players on each side of a threshold
PACE = "seconds_per_char"


@dataclass(frozen=True)
class Metric:
    """A measurement that a threshold cuts.

    Attributes:
        field: of Segment. step: of the reject. option: of Thresholds.
        sign: 1 where larger is better, -1 where smaller is.
        step_size: distance of the other values whose cost is shown.
        limits: smallest and largest value that the threshold may have.
    """

    field: str
    step: str
    option: str
    title: str
    sign: int
    step_size: float
    limits: tuple[float, float]


METRICS = (
    Metric("quality", "quality", "min_quality", "Quality, DNSMOS overall (1 to 5)", 1, 0.2, (1, 5)),
    Metric("snr", "snr", "min_snr", "Signal-to-noise ratio (dB)", 1, 2.0, (-20, 100)),
    Metric("clipping", "clipping", "max_clipping", "Share of clipped samples", -1, 0.0005, (0, 1)),
    Metric("sound", "sound", "max_sound", "Probability of music or another unwanted sound", -1, 0.1, (0, 1)),
    Metric(PACE, "pace", "pace_fences", "Seconds a character", -1, 0.5, (0.5, 10)),
    Metric(
        "language_probability", "language", "min_language_probability", "Probability of the language", 1, 0.1, (0, 1)
    ),
    Metric("cer", "agreement", "max_cer", "Disagreement of text and recogniser (CER)", -1, 0.05, (0, 2)),
)


@dataclass(frozen=True)
class Cost:
    """What another value of a threshold would change. seconds: more kept (negative: fewer)."""

    value: float
    seconds: float
    segments: int


@dataclass(frozen=True)
class Histogram:
    """Seconds of audio by value. edges: [B + 1]; kept, rejected: [B]; values beyond the edges are in the outer bins."""

    edges: list[float]
    kept: list[float]
    rejected: list[float]


@dataclass(frozen=True)
class Edge:
    """One threshold.

    Attributes:
        threshold: the option. bounds: the values that it stands for, of the measurement.
        kept, rejected: the segments nearest to a bound on either side.
    """

    metric: Metric
    threshold: float
    bounds: tuple[float, ...]
    histogram: Histogram
    kept: list[Segment]
    rejected: list[Segment]
    costs: list[Cost]


def edges_of(segments: Sequence[Segment], config: PrepareConfig) -> list[Edge]:
    """Each threshold of what was measured."""
    missed = {metric.step: _misses(metric, segments, config) for metric in METRICS}
    missed["other_language"] = np.array(
        [bool(config.language and s.language and s.language != config.language) for s in segments], np.bool_
    )
    measured = [metric for metric in METRICS if any(getattr(segment, metric.field) is not None for segment in segments)]
    return [_edge(metric, segments, config, missed) for metric in measured]


def _misses(metric: Metric, segments: Sequence[Segment], config: PrepareConfig) -> np.ndarray:
    """bool [N]; what was not measured passes."""
    values_N = np.array([np.nan if (v := getattr(s, metric.field)) is None else v for s in segments], np.float64)
    if metric.field == PACE:
        fences = _fences(segments, config)
        nothing = (-np.inf, np.inf)
        low_N, high_N = np.array([fences.get(s.language, nothing) for s in segments]).reshape(-1, 2).T
        return (values_N < low_N) | (values_N > high_N)
    return (values_N - getattr(config, metric.option)) * metric.sign < 0


def _fences(segments: Sequence[Segment], config: PrepareConfig) -> dict[str | None, tuple[float, float]]:
    """As they are decided by: of every segment with a text."""
    usable = [s for s in segments if s.reject is None or s.reject.step not in FINAL]
    return pace_fences([replace(segment, reject=None) for segment in usable], config.pace_fences)


def _bounds(metric: Metric, segments: Sequence[Segment], config: PrepareConfig) -> tuple[float, ...]:
    """The values of the measurement at which it decides; of fences those of the most frequent language."""
    if metric.field != PACE:
        return (getattr(config, metric.option),)
    (language, _), *_ = Counter(s.language for s in segments if s.seconds_per_char is not None).most_common(1)
    return _fences(segments, config).get(language, ())


def _edge(metric: Metric, segments: Sequence[Segment], config: PrepareConfig, missed: dict[str, np.ndarray]) -> Edge:
    bounds = _bounds(metric, segments, config)

    def nearness(segment: Segment) -> float:
        return min((abs(getattr(segment, metric.field) - bound) for bound in bounds), default=0.0)

    having = [segment for segment in segments if getattr(segment, metric.field) is not None]
    misses = {segment.id for segment, miss in zip(segments, missed[metric.step], strict=True) if miss}
    kept = sorted((segment for segment in having if segment.keep), key=nearness)
    rejected = [s for s in having if s.id in misses and s.reject is not None and s.reject.step == metric.step]
    return Edge(
        metric=metric,
        threshold=getattr(config, metric.option),
        bounds=bounds,
        histogram=histogram(
            [getattr(segment, metric.field) for segment in having],
            [segment.milliseconds / 1000 for segment in having],
            [segment.keep for segment in having],
            bounds,
        ),
        kept=kept[:EDGE_SEGMENTS] if bounds else [],
        rejected=sorted(rejected, key=nearness)[:EDGE_SEGMENTS],
        costs=_costs(metric, segments, config, missed),
    )


def histogram(values: npt.ArrayLike, seconds: npt.ArrayLike, keep: npt.ArrayLike, bounds: Sequence[float]) -> Histogram:
    """Seconds by value, kept and not, between the 1st and 99th percentile and around the bounds."""
    values_N, seconds_N, keep_N = np.asarray(values), np.asarray(seconds), np.asarray(keep, np.bool_)
    low, high = np.percentile(values_N, (1, 99))
    low, high = float(min(low, *bounds)) if bounds else float(low), float(max(high, *bounds)) if bounds else float(high)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 0.5
    edges_B = np.linspace(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin, BINS + 1)
    inside_N = np.clip(values_N, edges_B[0], edges_B[-1])
    counts = [np.histogram(inside_N[side], edges_B, weights=seconds_N[side])[0] for side in (keep_N, ~keep_N)]
    return Histogram(edges_B.tolist(), *(count.tolist() for count in counts))


def _costs(
    metric: Metric, segments: Sequence[Segment], config: PrepareConfig, missed: dict[str, np.ndarray]
) -> list[Cost]:
    """Two values to either side of the threshold."""
    seconds_N = np.array([segment.milliseconds / 1000 for segment in segments])
    open_N = np.array([_threshold_decides(segment) for segment in segments], np.bool_)
    for step, missed_N in missed.items():
        if step != metric.step:
            open_N &= ~missed_N
    costs, threshold = [], getattr(config, metric.option)
    for number in (-2, -1, 1, 2):
        value = round(threshold + number * metric.step_size, 6)
        if threshold and metric.limits[0] <= value <= metric.limits[1]:
            then_N = ~_misses(metric, segments, replace(config, **{metric.option: value}))
            change_N = open_N * (then_N.astype(int) - (~missed[metric.step]).astype(int))
            costs.append(Cost(value, float(change_N @ seconds_N), int(change_N.sum())))
    return costs


def _threshold_decides(segment: Segment) -> bool:
    """No person and no step without a threshold has decided over it."""
    decided = segment.decision is not None and segment.decision.verdict is not None
    steps = {metric.step for metric in METRICS}
    return not decided and (segment.keep or (segment.reject is not None and segment.reject.step in steps))
