"""Several training runs on one page: curves over each other, validation and samples side by side, options that differ.

In: run folders. Out: plain values; the page makes nodes of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from higgs_tune.inspect.web.charts import figure
from higgs_tune.inspect.web.run import RunFolder, flat_options, generated_table, run_page, shown, validation_values
from higgs_tune.inspect.web.run_charts import (
    curve,
    eval_sets,
    in_set,
    number,
    thinned,
)

CHARTS = (  # metric, title, kind, note, axis
    ("text_loss", "Text loss", "train", "Training, in nats", {}),
    ("audio_loss", "Audio loss", "train", "Training, in nats", {}),
    ("text_loss", "Text loss", "eval", "In nats; step 0 is the base model", {}),
    ("audio_loss", "Audio loss", "eval", "In nats; step 0 is the base model", {}),
    ("learning_rate", "Learning rate", "train", "", {"exponentformat": "e"}),
    ("grad_norm", "Gradient norm", "train", "Before clipping", {"rangemode": "tozero"}),
    ("tokens_per_second", "Throughput", "train", "Useful positions of all ranks a second", {"rangemode": "tozero"}),
)
PATHS = {"output_dir"}  # options that differ between any two runs


def names_of(runs: Sequence[RunFolder]) -> list[str]:
    """A short name for each run: that of its folder, with its place where two have the same."""
    names = [run.folder.resolve().name for run in runs]
    return [f"{place}. {name}" if names.count(name) > 1 else name for place, name in enumerate(names, 1)]


def comparison(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The page's section on several runs; fills `audio` of the first run with the clips of all."""
    names = names_of(runs)
    return {
        "names": names,
        "charts": list(_charts(runs, names)),
        "validation": list(_validation(runs)),
        "options": differing_options(runs),
        "samples": _samples(runs),
    }


def runs_info(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The page's values on training runs: `run` for one, `comparison` for several."""
    several = len(runs) > 1
    return {"run": run_page(runs[0]) if len(runs) == 1 else None, "comparison": comparison(runs) if several else None}


def _charts(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterable[dict[str, Any]]:
    for metric, title, kind, note, axis in CHARTS:
        for name in (
            list(dict.fromkeys(name for run in runs for name in eval_sets(run.lines))) if kind == "eval" else [""]
        ):
            drawn = []
            for tone, run in enumerate(runs):
                lines = in_set(run.lines, name) if kind == "eval" else thinned(run.lines)
                style: dict[str, Any] = {"mode": "lines+markers"} if kind == "eval" else {}
                drawn.append(curve(lines, names[tone], (line.get(metric) for line in lines), tone=tone % 8, **style))
            if any(drawn):
                where = f", validation on {name}" if name else ""
                chosen = [one for one in drawn if one]
                yield figure(f"compare-{kind}-{name}-{metric}", title + where, note, chosen, x="step", yaxis=axis)


def _validation(runs: Sequence[RunFolder]) -> Iterable[list[str]]:
    """Rows of set, metric, and for each run the base model's value, the best, and the last."""
    tables = [validation_values(run.lines) for run in runs]
    for name, metric in dict.fromkeys(key for table in tables for key in table):
        yield [f"{name}: {metric.replace('_', ' ')}", *(table.get((name, metric), "") for table in tables)]


def differing_options(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Rows of an option's name and its value in each run, for options whose values differ."""
    options = [dict(flat_options(run.config)) for run in runs]
    rows = []
    for name in dict.fromkeys(name for one in options for name in one):
        values = [shown(one.get(name)) for one in options]
        if len(set(values)) > 1 and name.rpartition(".")[2] not in PATHS:
            rows.append([name.removeprefix("options."), *values])
    return rows


def _samples(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A row for each key: text, reference, target, the base model, and the last sample of each run."""
    rows: dict[str, dict[str, Any]] = {}
    shared = runs[0].audio
    for place, run in enumerate(runs):
        table = generated_table(run, shared)
        for row in table["rows"]:
            same = rows.setdefault(row["key"], {**row, "steps": None, "base": None, "runs": [None] * len(runs)})
            steps = row["steps"]
            same["base"] = same["base"] or steps.get("base")
            later = [step for step in table["steps"] if step != "base" and step in steps]
            if later:
                same["runs"][place] = {"step": later[-1], **steps[later[-1]]}
    return list(rows.values())


def last_value(values: Iterable[Any]) -> float | None:
    """The last finite number."""
    return next((value for value in map(number, reversed(list(values))) if value is not None), None)
