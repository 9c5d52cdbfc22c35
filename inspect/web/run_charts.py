"""Charts of a training run: its lines of metrics as figures for plotly.js.

In: lines of metrics.jsonl. Out: figures, as `charts.figure` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from higgs_tune.inspect.web.charts import figure

Line = dict[str, Any]
MOST_POINTS = 2000  # of a curve
HELD_OUT = "held_out"
GPU = ("gpu_percent", "gpu_power_w", "gpu_temperature_c")
CPU = ("cpu_percent", "process_cpu_percent", "loader_cpu_percent")
MEMORY = ("host_memory_used_gb", "process_memory_gb", "loader_memory_gb", "max_memory_gb", "gpu_memory_used_gb",
          "disk_free_gb")  # fmt: skip
LOSSES, ACCURACIES = ("text_loss", "audio_loss", "eos_loss"), ("text_accuracy", "audio_accuracy")


def number(value: Any) -> float | None:
    """A metric as a finite number; None where it is missing, NaN or infinite (a gap in the curve)."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def curve(lines: list[Line], name: str, values: Iterable[Any], **style: Any) -> dict[str, Any] | None:
    """One line of a chart over the steps; None where no step has a value. Lines of one `tone` get one colour."""
    shown = [number(value) for value in values]
    if all(value is None for value in shown):
        return None
    steps = [line.get("step") for line in lines]
    return {"type": "scatter", "mode": "lines", "name": name, "x": steps, "y": shown, **style}


def _curves(lines: list[Line], names: Iterable[str], suffix: str = "", **style: Any) -> Iterable[dict[str, Any] | None]:
    for tone, name in enumerate(names):
        yield curve(lines, name.replace("_", " ") + suffix, (line.get(name) for line in lines), tone=tone, **style)


def _per_codebook(lines: list[Line], name: str) -> Iterable[dict[str, Any] | None]:
    by_book = [line[name] if isinstance(line.get(name), list) else [] for line in lines]
    for k in range(max(map(len, by_book), default=0)):
        yield curve(lines, f"codebook {k}", (values[k] if k < len(values) else None for values in by_book))


def thinning(lines: list[Line]) -> int:
    """n, where charts draw every n-th line, so that a curve has at most MOST_POINTS."""
    return -(-sum(line.get("kind") == "train" for line in lines) // MOST_POINTS) or 1


def _losses(lines: list[Line], train: list[Line]) -> list[dict[str, Any] | None]:
    """Losses of training, and dotted or dashed those of each validation set."""
    dashes = ("dot", "dash", "dashdot", "longdash")
    losses = [*_curves(train, LOSSES)]
    for place, name in enumerate(eval_sets(lines)):
        marked: dict[str, Any] = {"mode": "lines+markers", "line": {"dash": dashes[place % len(dashes)]}}
        where = ", validation" if name == HELD_OUT else f", {name}"
        losses += _curves(in_set(lines, name), LOSSES, where, **marked)
    return losses


def _scores(lines: list[Line]) -> Iterable[tuple[str, str, str, Iterable[dict[str, Any] | None], dict[str, Any]]]:
    """Charts of what judges said of the generated samples, beside the base model's and the recorded targets'."""
    samples, style = [line for line in lines if line.get("kind") == "samples"], {"mode": "lines+markers"}
    for name, title, note, layout in (
        ("cer", "Character errors of samples", "By the recogniser of --sample_asr", {"yaxis": {"tickformat": ".0%"}}),
        ("similarity", "Voice of samples", "Cosine to the reference's", {}),
    ):
        yield name, title, note, _curves(samples, [name, f"base_{name}", f"target_{name}"], **style), layout


def run_charts(lines: list[Line]) -> list[dict[str, Any]]:
    """Curves over the steps: losses by part and codebook, accuracies, throughput, data wait, learning rate, norm."""
    train, sets = thinned(lines), eval_sets(lines)
    val = in_set(lines, sets[0]) if sets else []
    losses = _losses(lines, train)
    share = {"yaxis": {"tickformat": ".0%"}}
    from_zero = {"yaxis": {"rangemode": "tozero"}}
    small = {"yaxis": {"exponentformat": "e"}}
    wait = {"yaxis": {"rangemode": "tozero", "tickformat": ".2%"}}
    by_book, hits = "audio_loss_per_codebook", "audio_accuracy_per_codebook"
    likely = "Share of next tokens that are the most likely one"
    rows: list[tuple[str, str, str, Iterable[dict[str, Any] | None], dict[str, Any]]] = [
        ("loss", "Loss by part", "Cross-entropy of the next token, in nats", losses, {}),
        ("books", "Audio loss by codebook", "Training, in nats", _per_codebook(train, by_book), {}),
        ("val-books", "Audio loss by codebook, validation", "In nats", _per_codebook(val, by_book), {}),
        ("accuracy", "Accuracy, validation", likely, _curves(val, ACCURACIES), share),
        ("book-accuracy", "Accuracy by codebook, validation", likely, _per_codebook(val, hits), share),
        (
            "machine",
            "CPU",
            "In percent: all cores; the loader's and the trainer's processes of one core",
            _curves(train, CPU),
            from_zero,
        ),
        (
            "memory",
            "Memory and disk",
            "In GB",
            _curves(train, MEMORY),
            from_zero,
        ),
        (
            "gpu",
            "GPU",
            "In percent, watts and °C",
            _curves(train, GPU),
            from_zero,
        ),
        *_scores(lines),
        ("throughput", "Throughput", "Useful positions of all ranks", _curves(train, ["tokens_per_second"]), from_zero),
        ("wait", "Data wait", "Share of a step spent waiting", _curves(train, ["data_wait_fraction"]), wait),
        ("time", "Time of a step", "In seconds", _curves(train, ["step_time_s"]), from_zero),
        ("rate", "Learning rate", "", _curves(train, ["learning_rate"]), small),
        ("norm", "Gradient norm", "Before clipping", _curves(train, ["grad_norm"]), from_zero),
    ]
    charts = []
    for name, title, note, curves, layout in rows:
        drawn = [one for one in curves if one]
        if drawn:
            charts.append(figure(f"run-{name}", title, note, drawn, x="step", **layout))
    return charts


def thinned(lines: list[Line]) -> list[Line]:
    """The lines of training that charts draw: every n-th, the last one among them."""
    train, every = [line for line in lines if line.get("kind") == "train"], thinning(lines)
    return train[(len(train) - 1) % every :: every]


def eval_sets(lines: list[Line]) -> list[str]:
    """Names of the sets that were validated on, the held-out split first."""
    names = dict.fromkeys(str(line.get("set", HELD_OUT)) for line in lines if line.get("kind") == "eval")
    return sorted(names, key=lambda name: name != HELD_OUT)


def in_set(lines: list[Line], name: str) -> list[Line]:
    """The validation lines of a set."""
    return [line for line in lines if line.get("kind") == "eval" and line.get("set", HELD_OUT) == name]
