"""A training run's output folder on the page: curves, validation, generated samples, trained modules.

In: the folder; every part may be absent. Out: plain values, and the audio files by number.

Guarantees: no file outside of the folder is read, whatever its lists and links name (tests/test_run_page.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from higgs_tune.inspect.web.charts import figure
from higgs_tune.shards.errors import UserError

Line = dict[str, Any]
GENERATED = "samples.json"
FACTS = ("reached_eos", "duration_s", "duration_ratio", "silence_ratio", "cer", "similarity", "heard")  # of a sample
MOST_POINTS = 2000  # of a curve


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder.

    Attributes:
        lines: of metrics.jsonl.
        trained: dicts of module, shape, count.
        generated: content of each samples.json, by the name of its step.
        audio: files that the page may play; a clip is named by its place in this list.
    """

    folder: Path
    config: dict[str, Any]
    lines: list[Line]
    trained: list[dict[str, Any]]
    generated: dict[str, list[dict[str, Any]]]
    audio: list[Path] = field(default_factory=list)


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: it is not a run folder, or a file in it is damaged.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError("no run here", where=folder, expected="metrics.jsonl")
    config = folder / "config.yaml"
    trained = folder / "trainable.json"
    try:
        options = yaml.safe_load(config.read_text()) if config.is_file() else {}
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {error}", where=config) from error
    samples = folder / "samples"
    lists = [path for path in samples.glob(f"*/{GENERATED}") if inside(samples, str(path.relative_to(samples)))]
    generated = {path.parent.name: _objects(path) for path in lists}
    steps = sorted(generated, key=lambda name: (name != "base", name))
    return RunFolder(
        folder=folder,
        config=options if isinstance(options, dict) else {},
        lines=_metrics(metrics),
        trained=_objects(trained) if trained.is_file() else [],
        generated={name: generated[name] for name in steps},
    )


def _objects(path: Path) -> list[dict[str, Any]]:
    """A JSON file that holds a list of objects."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=path) from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError("damaged file of a run", where=path, expected="a list of objects")
    return value


def _metrics(path: Path) -> list[Line]:
    """The lines of metrics.jsonl; a last line without a line break is still being written and is left out."""
    complete = path.read_bytes().rpartition(b"\n")[0].split(b"\n")
    lines = []
    for number, line in enumerate(complete, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} is not JSON: {error}", where=path) from error
            if not isinstance(value, dict):
                raise UserError(f"line {number} is not an object", where=path, got=value)
            lines.append(value)
    return lines


def inside(folder: Path, name: str) -> Path | None:
    """The file of that name within a folder; None where it is missing or, after links are followed, outside."""
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, a null byte, a loop of links
        return None
    return path if path.is_file() and path.is_relative_to(folder.resolve()) else None


def run_page(run: RunFolder) -> dict[str, Any]:
    """The run's part of the page; fills `run.audio`."""
    return {
        "name": run.folder.resolve().name,
        "config": [[name, _shown(value)] for name, value in _flat(run.config)],
        "charts": run_charts(run.lines),
        "every": thinning(run.lines),
        "validation": validation_table(run.lines),
        "trained": trained_table(run.trained),
        "generated": generated_table(run),
    }


def _flat(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


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


def _scores(lines: list[Line], name: str) -> Iterable[dict[str, Any] | None]:
    """A figure of the generated samples, beside the base model's and the recorded targets'."""
    samples = [line for line in lines if line.get("kind") == "samples"]
    return _curves(samples, [name, f"base_{name}", f"target_{name}"], mode="lines+markers")


def thinning(lines: list[Line]) -> int:
    """n, where charts draw every n-th line, so that a curve has at most MOST_POINTS."""
    return -(-sum(line.get("kind") == "train" for line in lines) // MOST_POINTS) or 1


LOSSES, ACCURACIES = ("text_loss", "audio_loss", "eos_loss"), ("text_accuracy", "audio_accuracy")


def run_charts(lines: list[Line]) -> list[dict[str, Any]]:
    """Curves over the steps: losses by part and codebook, accuracies, throughput, data wait, learning rate, norm."""
    train = [line for line in lines if line.get("kind") == "train"]
    every = thinning(lines)
    train = train[(len(train) - 1) % every :: every]  # the last one stays
    val = [line for line in lines if line.get("kind") == "eval"]
    marked: dict[str, Any] = {"mode": "lines+markers", "line": {"dash": "dot"}}
    losses = [*_curves(train, LOSSES), *_curves(val, LOSSES, ", validation", **marked)]
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
        ("cer", "Character errors of samples", "By the recogniser of --sample_asr", _scores(lines, "cer"), share),
        ("similarity", "Voice of samples", "Cosine to the reference's", _scores(lines, "similarity"), {}),
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


def validation_table(lines: list[Line]) -> list[list[str]]:
    """Rows of metric, base model (step 0), best, last; empty without validation."""
    val = [line for line in lines if line.get("kind") == "eval"]
    rows = []
    for name in (*LOSSES, *ACCURACIES):
        values = [(line.get("step"), value) for line in val if (value := number(line.get(name))) is not None]
        if not values:
            continue
        pick = max if name in ACCURACIES else min
        best = pick(values, key=lambda item: item[1])
        base = next((value for step, value in values if step == 0), None)
        cells = [f"{base:.4f}" if base is not None else "", f"{best[1]:.4f} (step {best[0]})"]
        rows.append([name.replace("_", " "), *cells, f"{values[-1][1]:.4f} (step {values[-1][0]})"])
    return rows


def trained_table(trained: list[dict[str, Any]]) -> dict[str, Any]:
    """Trained modules with equal layers joined: rows of pattern, shape, modules, parameters; and the sum."""
    groups: dict[tuple[str, str], list[int]] = {}
    for entry in trained:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", str(entry.get("module")))
        shape = " × ".join(str(size) for size in entry.get("shape") or ())
        groups.setdefault((pattern, shape), []).append(int(entry.get("count") or 0))
    rows = [[pattern, shape, len(counts), sum(counts)] for (pattern, shape), counts in groups.items()]
    return {"rows": rows, "parameters": sum(row[3] for row in rows)}


def generated_table(run: RunFolder) -> dict[str, Any]:
    """Generated samples: one row a key; its audio by step, beside target and reference."""
    samples = run.folder / "samples"
    numbers: dict[Path, int] = {}

    def clip(name: str) -> str | None:
        path = inside(samples, name)
        if path is None:
            return None
        if path not in numbers:
            numbers[path] = len(run.audio)
            run.audio.append(path)
        return f"run/{numbers[path]}"

    rows: dict[str, dict[str, Any]] = {}
    for step, entries in run.generated.items():
        for entry in entries:
            key = str(entry.get("key"))
            if key not in rows:
                fixed = {kind: clip(f"target/{key}.{kind}.wav") for kind in ("reference", "target")}
                text = str(entry.get("target_text") or entry.get("text") or "")
                rows[key] = {"key": key, "text": text, **fixed, "steps": {}}
            facts = {name: entry.get(name) for name in FACTS}
            if entry.get("text") != entry.get("target_text"):  # a run without audio generates text
                facts["text"] = str(entry.get("text"))
            wav = entry.get("wav")
            rows[key]["steps"][step] = {**facts, "clip": clip(f"{step}/{wav}") if wav else None}
    return {"steps": list(run.generated), "rows": list(rows.values())}
