"""Pictures and tables of the study, from what `run.py` wrote. Needs matplotlib, which the project itself does not.

    python bench/study/plot.py bench/study/results.jsonl docs/study [EARLIER.jsonl]

Prints tables in Markdown; writes `OUT/curves.svg` and `OUT/figures.svg`. EARLIER: results on other miniatures, of which
only differences are taken, each to the run of the same miniature with the same seed.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp

BASELINE = "two stages"
CURVES = {"two stages": "#1f77b4", "one stage": "#ff7f0e", "leaked labels": "#d62728"}
UNIFORM = {"text_loss": 7.10, "audio_loss": 6.93}  # nats, of a uniform guess
Run = tuple[str, int]  # miniature, seed
Results = dict[str, dict[Run, dict[str, Any]]]


def read_results(*paths: Path) -> Results:
    """Results by arm and run."""
    results = defaultdict[str, dict[Run, dict[str, Any]]](dict)
    for line in (json.loads(line) for path in paths for line in path.read_text().splitlines()):
        results[line["arm"]][line["miniature"]["base"], line["seed"]] = line
    return {arm: dict(sorted(runs.items())) for arm, runs in results.items()}


def values(results: Results, arm: str, language: str, name: str = "cer") -> dict[Run, float]:
    """A figure of every run of an arm."""
    return {
        run: line["figures"][language]["model"][name]["mean"]
        for run, line in results[arm].items()
        if line.get("figures") and line["figures"][language]["model"][name]["mean"] is not None
    }


def mean(numbers: dict[Run, float]) -> float:
    """The mean over runs."""
    return sum(numbers.values()) / len(numbers) if numbers else math.nan


def differences(results: Results, arm: str, language: str) -> dict[Run, float]:
    """Each run's difference to the baseline of the same miniature and seed, in points; none of `base` and itself."""
    of_arm, of_base = values(results, arm, language), values(results, BASELINE, language)
    return {run: 100 * (of_arm[run] - of_base[run]) for run in of_arm.keys() & of_base if arm not in (BASELINE, "base")}


def with_interval(pairs: dict[Run, float]) -> str:
    """Their mean, with a 95 % interval over runs (Student's t)."""
    if len(pairs) < 2:
        return "–"
    low, high = ttest_1samp(list(pairs.values()), 0).confidence_interval(0.95)
    return f"{mean(pairs):+.1f} [{low:+.1f}, {high:+.1f}]"


def print_tables(results: Results) -> None:
    """Figures by arm."""
    print("| | Arabic CER % (seeds) | to two stages | English CER % (seeds) | to two stages | similarity, Arabic |")
    print("|---|---|---|---|---|---|")
    for arm in results:
        cells = [arm]
        for language in ("ar", "en"):
            seeds = values(results, arm, language)
            listed = ", ".join(f"{100 * value:.0f}" for value in seeds.values())
            cells += [f"{100 * mean(seeds):.1f} ({listed})", with_interval(differences(results, arm, language))]
        cells.append(f"{mean(values(results, arm, 'ar', 'sim')):.2f}")
        print("| " + " | ".join(cells) + " |")
    for arm, runs in results.items():
        for (_, seed), line in runs.items():
            last = (line.get("eval") or [{}])[-1]
            print(f"{arm} {seed}: {last} {line.get('refused', '')[:160]}")


def print_pooled(results: Results) -> None:
    """Differences over several miniatures."""
    print("| | pairs of runs | Arabic | English |\n|---|---|---|---|")
    for arm in results:
        arabic, english = (differences(results, arm, language) for language in ("ar", "en"))
        if arabic:
            print("|", arm, "|", len(arabic), "|", with_interval(arabic), "|", with_interval(english), "|")


def points_of(line: dict[str, Any], kind: str, loss: str) -> tuple[list[int], list[float]]:
    """Steps and losses of a run. Stage 2 begins by measuring the base, at the last step of stage 1: left out."""
    points: dict[int, float] = {}
    for point in line.get(kind, []):
        if loss in point:
            points.setdefault(point["step"], point[loss])
    return list(points), list(points.values())


def draw_curves(plt: Any, results: Results, out: Path) -> None:
    """Losses over the steps: of training (thin) and of held-out samples (thick)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, loss in zip(axes, UNIFORM, strict=True):
        for arm, colour in CURVES.items():
            for number, line in enumerate(results[arm].values()):
                axis.plot(*points_of(line, "train", loss), color=colour, linewidth=0.5)
                label = None if number else arm
                axis.plot(*points_of(line, "eval", loss), color=colour, linewidth=1.8, label=label)
        axis.axhline(UNIFORM[loss], color="grey", linestyle=":", label="uniform guess")
        axis.set(title=loss.replace("_", " ") + ", nats", xlabel="step of 1,024 tokens", yscale="log")
        axis.legend()
    figure.savefig(out / "curves.svg")


def draw_figures(plt: Any, results: Results, out: Path) -> None:
    """Character errors of every arm: a dot a seed, a bar for their mean."""
    arms = list(results)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(arms) + 1.2), sharey=True, layout="constrained")
    for axis, (language, name) in zip(axes, (("ar", "Arabic"), ("en", "English")), strict=True):
        for place, arm in enumerate(arms):
            seeds = values(results, arm, language)
            axis.barh(place, 100 * mean(seeds), color="#c6dbef")
            axis.plot(
                [100 * value for value in seeds.values()], [place] * len(seeds), "o", color="#08519c", markersize=4
            )
        axis.set(title=f"{name}, held-out sentences", xlabel="character errors, %", yticks=range(len(arms)))
        axis.set_yticklabels(arms)
    axes[0].invert_yaxis()
    figure.savefig(out / "figures.svg")


def main() -> None:
    source, out, *earlier = map(Path, sys.argv[1:])
    results = read_results(source)
    print_tables(results)
    if earlier:
        print_pooled(read_results(source, *earlier))
    plots: Any = importlib.import_module("matplotlib")
    plots.use("svg")
    plots.rcParams["svg.hashsalt"] = "study"
    plt = importlib.import_module("matplotlib.pyplot")
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(plt, results, out)
    draw_figures(plt, results, out)


if __name__ == "__main__":
    main()
