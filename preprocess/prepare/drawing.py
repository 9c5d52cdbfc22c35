"""Numbers of the report as text and as shapes of its drawings.

Units: drawings are 400 wide; a chart's bars stand on the line y = 125 and are at most 105 high.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from higgs_tune.preprocess.prepare.records import Segment
from higgs_tune.preprocess.prepare.thresholds import Cost, Edge, Histogram

WIDTH, BASE, HEIGHT, MAP_HEIGHT, MARGIN = 400, 125, 105, 300, 8
POINTS = 2000


def amount(seconds: float) -> str:
    """A length of audio: 14.2 h, 3.5 min or 12 s."""
    if abs(seconds) >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if abs(seconds) >= 60 else f"{seconds:.0f} s"


def plain(value: float) -> str:
    """A measurement: up to four digits."""
    return f"{value:.4g}"


def hue(number: int) -> int:
    """A colour, in degrees, far from those of the numbers before."""
    return round(number * 137.508 + 210) % 360


def pairs(count: float) -> str:
    """A number of pairs of segments."""
    return f"{count:,.0f} pairs"


def drawn(
    histogram: Histogram,
    bounds: Sequence[float],
    sides: tuple[str, str] = ("kept", "not"),
    shown: Callable[[float], str] = amount,
) -> dict[str, Any]:
    """Bars of a histogram, kept below rejected, and the thresholds as marks.

    Args:
        sides: words for kept and rejected. shown: a bar's height in words.
    """
    low, high = histogram.edges[0], histogram.edges[-1]
    heights = [kept + rejected for kept, rejected in zip(histogram.kept, histogram.rejected, strict=True)]
    peak = max(heights, default=0.0) or 1.0

    def x(value: float) -> float:
        return round(WIDTH * (value - low) / (high - low), 2)

    bars = []
    for number, (kept, rejected) in enumerate(zip(histogram.kept, histogram.rejected, strict=True)):
        start, end = histogram.edges[number : number + 2]
        kept_high, rejected_high = HEIGHT * kept / peak, HEIGHT * rejected / peak
        bars.append({
            "x": x(start), "width": round(x(end) - x(start) - 1, 2),
            "kept": round(kept_high, 2), "kept_y": round(BASE - kept_high, 2),
            "rejected": round(rejected_high, 2), "rejected_y": round(BASE - kept_high - rejected_high, 2),
            "title": f"{plain(start)} to {plain(end)}: {shown(kept)} {sides[0]}, {shown(rejected)} {sides[1]}",
        })  # fmt: skip
    marks = [{"x": x(value), "label": plain(value), "anchor": _anchor(x(value))} for value in bounds]
    top = "" if any(mark["x"] > 250 for mark in marks) else f"highest: {shown(peak)}"
    return {"bars": bars, "marks": marks, "low": plain(low), "high": plain(high), "top": top}


def _anchor(x: float) -> str:
    return "start" if x < 40 else "end" if x > WIDTH - 40 else "middle"


def shown_edge(edge: Edge) -> dict[str, Any]:
    """A threshold as the page shows it."""
    metric = edge.metric

    def valued(segments: Sequence[Segment]) -> list[tuple[Segment, str]]:
        return [(segment, plain(getattr(segment, metric.field))) for segment in segments]

    return {
        "step": metric.step,
        "option": metric.option,
        "title": metric.title,
        "sentence": f"--{metric.option} {plain(edge.threshold)}",
        "chart": drawn(edge.histogram, edge.bounds),
        "kept": valued(edge.kept),
        "rejected": valued(edge.rejected),
        "costs": [_cost(edge.threshold, cost) for cost in edge.costs],
    }


def _cost(threshold: float, cost: Cost) -> dict[str, str]:
    sign = "+" if cost.seconds > 0 else "−" if cost.seconds < 0 else "±"
    return {
        "change": f"{plain(threshold)} → {plain(cost.value)}",
        "length": f"{sign}{amount(abs(cost.seconds))}",
        "segments": f"{cost.segments:+,}" if cost.segments else "0",
        "kind": "gain" if cost.seconds > 0 else "loss" if cost.seconds < 0 else "",
    }


def map_points(segments: Sequence[Segment], hues: dict[str, int]) -> list[dict[str, Any]]:
    """Points of the map of voices, at most `POINTS` of them, evenly chosen."""
    placed = [
        (s, s.embedding_map, s.speaker) for s in segments if s.embedding_map is not None and s.speaker is not None
    ]
    placed = placed[:: max(1, -(-len(placed) // POINTS))]
    if not placed:
        return []
    spans = [(min(axis), (max(axis) - min(axis)) or 1.0) for axis in zip(*(at for _, at, _ in placed), strict=True)]
    sizes = (WIDTH - 2 * MARGIN, MAP_HEIGHT - 2 * MARGIN)

    def scaled(at: tuple[float, float], axis: int) -> float:
        low, span = spans[axis]
        return round(MARGIN + sizes[axis] * (at[axis] - low) / span, 1)

    return [
        {"x": scaled(at, 0), "y": scaled(at, 1), "hue": hues[speaker], "speaker": speaker, "keep": segment.keep}
        for segment, at, speaker in placed
    ]
