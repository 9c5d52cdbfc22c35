"""A training run's output folder on the page: curves, validation, generated samples, trained modules.

In: the folder; every part may be absent. Out: plain values, and the audio files by number.

Guarantees: no file outside of the folder is read, whatever its lists and links name (tests/test_run_page.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from higgs_tune.inspect.web.run_charts import (
    ACCURACIES,
    HELD_OUT,
    LOSSES,
    Line,
    eval_sets,
    in_set,
    number,
    run_charts,
    thinning,
)
from higgs_tune.shards.durable import read_json_lines
from higgs_tune.shards.errors import UserError

GENERATED = "samples.json"
FACTS = ("reached_eos", "duration_s", "duration_ratio", "silence_ratio", "cer", "similarity", "heard")  # of a sample
MOST_LOOKS = 200  # at predictions


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder.

    Attributes:
        lines: of metrics.jsonl.
        trained: dicts of module, shape, count.
        generated: content of each samples.json, by the name of its step.
        diagnostics: lines of diagnostics.jsonl.
        audio: files that the page may play; a clip is named by its place in this list.
    """

    folder: Path
    config: dict[str, Any]
    lines: list[Line]
    trained: list[dict[str, Any]]
    generated: dict[str, list[dict[str, Any]]]
    audio: list[Path] = field(default_factory=list)
    diagnostics: list[Line] = field(default_factory=list)


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
        lines=read_json_lines(metrics),
        trained=_objects(trained) if trained.is_file() else [],
        generated={name: generated[name] for name in steps},
        diagnostics=read_json_lines(looks) if (looks := folder / "diagnostics.jsonl").is_file() else [],
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
        "config": [[name, shown(value)] for name, value in flat_options(run.config)],
        "charts": run_charts(run.lines),
        "every": thinning(run.lines),
        "validation": validation_table(run.lines),
        "warnings": [
            [str(line.get("step")), str(line.get("message"))] for line in run.lines if line.get("kind") == "warning"
        ],
        "predictions": run.diagnostics[-MOST_LOOKS:],
        "trained": trained_table(run.trained),
        "generated": generated_table(run),
    }


def flat_options(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names with dots, and values, of a nested mapping."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flat_options(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def shown(value: Any) -> str:
    """An option's value as text: nothing for none, items of a list apart by commas."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "" if value is None else str(value)


def validation_table(lines: list[Line]) -> list[list[str]]:
    """Rows of metric (and set, where it is not the held-out split), base model (step 0), best, last."""
    sets = eval_sets(lines)
    rows = []
    for name in sets:
        before = "" if name == HELD_OUT else f"{name}: "
        rows += [[before + row[0], *row[1:]] for row in _validation_rows(in_set(lines, name))]
    return rows


def validation_values(lines: list[Line]) -> dict[tuple[str, str], str]:
    """By set and metric: the base model's value, the best, the last, as one text."""
    return {
        (name, row[0]): f"{row[1] or 'no base'} → best {row[2]}, last {row[3]}"
        for name in eval_sets(lines)
        for row in _validation_rows(in_set(lines, name))
    }


def _validation_rows(val: list[Line]) -> list[list[str]]:
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


def generated_table(run: RunFolder, audio: list[Path] | None = None) -> dict[str, Any]:
    """Generated samples: one row a key; its audio by step, beside target and reference.

    Args:
        audio: the page's list of clips, which gets those of the run; by default the run's own.
    """
    samples = run.folder / "samples"
    listed = run.audio if audio is None else audio
    numbers = {path: number for number, path in enumerate(listed)}

    def clip(name: str) -> str | None:
        path = inside(samples, name)
        if path is None:
            return None
        if path not in numbers:
            numbers[path] = len(listed)
            listed.append(path)
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
