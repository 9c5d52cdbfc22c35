"""Charts of a shard set, as figures for plotly.js.

In: statistics. Out: dicts `{id, title, note, data, layout}`; the page adds colours. Names from the data are escaped
here, since plotly reads texts as markup.

Shapes: K codebooks, C codes of a codebook, B bins.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from higgs_tune.inspect.stats import ScanResult, code_usage, packed_lengths
from higgs_tune.shards.reader import ShardSet

BINS = 40
MOST_SPEAKERS = 30
CATEGORIES = {"type": "category"}
LOG = {"type": "log"}
HEAT_BINS = 128  # codes are shown in groups, or the picture of a codebook would be wider than a screen


def figure(
    name: str,
    title: str,
    note: str,
    data: list[dict[str, Any]],
    *,
    x: str = "",
    y: str = "",
    xaxis: dict[str, Any] | None = None,
    yaxis: dict[str, Any] | None = None,
    **layout: Any,
) -> dict[str, Any]:
    """One chart. x, y: titles of the axes; xaxis, yaxis: other plotly options of the axes."""
    axes = {"xaxis": {"title": {"text": x}, **(xaxis or {})}, "yaxis": {"title": {"text": y}, **(yaxis or {})}}
    return {"id": name, "title": title, "note": note, "data": data, "layout": {**axes, **layout}}


def bins_of(values: Any) -> np.ndarray:
    """Edges of a histogram, float64 [B + 1]: about the square root of the number of values, at most BINS."""
    return np.histogram_bin_edges(values, min(BINS, 1 + int(np.sqrt(len(values)))))


def histogram(values: Any, name: str = "", bins: np.ndarray | None = None) -> dict[str, Any]:
    """Bars of a histogram: the page gets bins, not values. bins: common edges for bars side by side."""
    counts, edges = np.histogram(values, bins if bins is not None else bins_of(values))
    bar = {"type": "bar", "x": _short((edges[:-1] + edges[1:]) / 2), "y": counts.tolist(), "name": name}
    if bins is None:
        bar["width"] = _short(np.diff(edges))
    return bar | {"hovertemplate": "%{x:.4~g}: %{y}<extra></extra>"}


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def data_charts(shards: ShardSet, scanned: ScanResult) -> list[dict[str, Any]]:
    """Lengths, speaking rate, speakers, scripts."""
    every = [*scanned.target_s, *scanned.reference_s]
    bins = bins_of(every)
    parts = [histogram(scanned.target_s, "targets", bins), histogram(scanned.reference_s, "references", bins)]
    lengths = packed_lengths(shards)
    charts = [
        figure(
            "seconds",
            "Length of the audio",
            f"{len(every):,} segments",
            parts,
            x="seconds",
            y="segments",
            barmode="group",
        ),
        figure(
            "positions",
            "Length of a sample",
            "Positions that a sample takes of a pack",
            [histogram(lengths)],
            x="positions",
            y="samples",
        ),
    ]
    if scanned.letters_per_s:
        note = "Letters and digits of the target's text for each second of its audio; outliers are often wrong pairs"
        rate = histogram(scanned.letters_per_s)
        charts.append(figure("rate", "Speaking rate", note, [rate], x="letters a second", y="samples"))
    scripts = scanned.scripts.most_common()
    charts.append(
        figure("scripts", "Script", "The script of most letters of the target text", [_bars(scripts)], x="samples")
    )
    charts.append(_speakers(shards))
    return charts


def _bars(items: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Horizontal bars, the first on top."""
    names = [html.escape(name or "(none)") for name, _ in items][::-1]
    values = [value for _, value in items][::-1]
    return {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": names,
        "hovertemplate": "%{y}: %{x:.4~g}<extra></extra>",
    }


def _speakers(shards: ShardSet) -> dict[str, Any]:
    names = shards.manifest["speakers"]
    hours = np.bincount(shards.index["speaker"], shards.index["seconds"], minlength=len(names)) / 3600
    order = np.argsort(-hours, kind="stable")[:MOST_SPEAKERS].tolist()
    unit, size = ("hours", 1) if hours.max(initial=0) >= 1 else ("minutes", 60)
    items = [(f"{number}. {_clip(names[row])}", float(hours[row]) * size) for number, row in enumerate(order, 1)]
    note = f"The {len(items)} of {len(names):,} with most audio"
    return figure("speakers", "Speakers", note, [_bars(items)], x=f"{unit}, references included")


def _clip(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def code_charts(scanned: ScanResult) -> list[dict[str, Any]]:
    """Use of the codec's codes."""
    usage = code_usage(scanned.counts_KC)
    books, size = scanned.counts_KC.shape
    names = [str(k) for k in range(books)]
    dead = [f"{count} dead" for count in usage["dead_codes"]]
    bars = {"type": "bar", "x": names, "y": usage["entropy_bits"], "text": dead}
    note = (
        f"Bits a code carries, of {np.log2(size):g} at most; dead: codes that never occur. {usage['frames']:,} frames"
    )
    entropy = figure("entropy", "Entropy of the codes", note, [bars], x="codebook", y="bits", xaxis=CATEGORIES)
    group = max(size // HEAT_BINS, 1)
    grouped_KB = np.add.reduceat(scanned.counts_KC, np.arange(0, size, group), axis=1)
    shares_KB = grouped_KB / np.maximum(grouped_KB.sum(1, keepdims=True), 1)
    columns = (np.arange(grouped_KB.shape[1]) * group).tolist()
    heat = {"type": "heatmap", "x": columns, "y": names, "z": [_short(row) for row in shares_KB]}
    heat |= {"hovertemplate": "codebook %{y}, from code %{x}: %{z:.3%}<extra></extra>"}
    note = f"Share of a codebook's frames, in groups of {group} codes"
    heatmap = figure("codes", "Which codes occur", note, [heat], x="code", y="codebook", yaxis=CATEGORIES)
    ranked = -np.sort(-scanned.counts_KC, axis=1)
    shown = np.unique(np.geomspace(1, size, 80).round().astype(int)) - 1
    lines = [
        {"type": "scatter", "mode": "lines", "name": f"codebook {k}", "x": (shown + 1).tolist(), "y": uses}
        for k, uses in enumerate(ranked[:, shown].tolist())
    ]
    note = "Uses of the n-th most frequent code; a codebook in good use falls slowly"
    return [entropy, heatmap, figure("ranks", "Codes by rank", note, lines, x="rank", y="uses", xaxis=LOG, yaxis=LOG)]
