"""Training runs as a table: what they are, how far they have come, and how well they do.

In: run folders. Out: one dict a run, ready for JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from higgs_tune.inspect.show import open_console
from higgs_tune.inspect.web.compare import last_value
from higgs_tune.inspect.web.run import RunFolder, read_run
from higgs_tune.inspect.web.run_charts import eval_sets, in_set, number
from rich.table import Table
from rich.text import Text

RESULTS = ("adapter_model.safetensors", "model.safetensors")


def summarise_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A dict for each run.

    Raises:
        UserError: a folder is no run.
    """
    return [_summary(read_run(folder)) for folder in folders]


def _summary(run: RunFolder) -> dict[str, Any]:
    options, resolved = run.config.get("options") or {}, run.config.get("resolved") or {}
    train = [line for line in run.lines if line.get("kind") == "train"]
    first = next(iter(eval_sets(run.lines)), None)
    val = in_set(run.lines, first) if first else []
    losses = {line.get("step"): value for line in val if (value := number(line.get("loss"))) is not None}
    later = {step: value for step, value in losses.items() if step}
    best = min(later, key=lambda step: later[step]) if later else None
    return {
        "run": str(run.folder),
        "stage": options.get("training_stage"),
        "state": _state(run),
        "step": train[-1].get("step") if train else 0,
        "total_steps": resolved.get("total_steps"),
        "text_loss": last_value(line.get("text_loss") for line in train),
        "audio_loss": last_value(line.get("audio_loss") for line in train),
        "validation_set": first,
        "base_loss": losses.get(0),
        "best_loss": later[best] if best is not None else None,
        "best_step": best,
        "tokens_per_second": last_value(line.get("tokens_per_second") for line in train),
        "learning_rate": options.get("learning_rate"),
        "lora_r": options.get("lora_r"),
        "warnings": sum(line.get("kind") == "warning" for line in run.lines),
    }


def _state(run: RunFolder) -> str:
    """finished: its result is there; stopped: by a signal; else unfinished: it runs, or it was killed."""
    if any((run.folder / name).is_file() for name in RESULTS):
        return "finished"
    return "stopped" if (run.folder / "stopped.json").is_file() else "unfinished"


def print_runs(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    heads = ("run", "stage", "state", "step", "text", "audio", "base", "best", "at", "tokens/s", "rate", "warnings")
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        cells = [row["run"], row["stage"], row["state"], _of(row["step"], row["total_steps"])]
        cells += [_loss(row[name]) for name in ("text_loss", "audio_loss", "base_loss", "best_loss")]
        speed = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
        cells += [row["best_step"], speed, row["learning_rate"], row["warnings"]]
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))
    open_console(200).print(table)


def _of(step: int, total: int | None) -> str:
    return f"{step}/{total}" if total else str(step)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
