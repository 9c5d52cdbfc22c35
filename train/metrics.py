"""What a run tells: metrics.jsonl, TensorBoard, and a line or a live bar for people. Rank 0 only.

In: sums over the steps since the last report, of all ranks. Out: one JSON object a report, under the keys of the
contract. Never: a mean of means; every loss is a sum divided by its own label count.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from torch.utils.tensorboard import SummaryWriter

from .diagnostics import as_text
from .loss import LossOptions


def loss_metrics(stats: list[float], options: LossOptions) -> dict[str, Any]:
    """Losses and accuracies from `Window.stats`, summed over all ranks; None where there is no label."""
    width = (len(stats) - 2 + 2) // 5  # 3 * (1 + K) + 2 * K + 2 values
    sums, hits, counts = (stats[i * width : (i + 1) * width] for i in range(3))
    eos, (pair_sum, pairs) = stats[3 * width : -2], stats[-2:]
    codebooks = width - 1
    means, shares = _ratios(sums, counts), options.codebook_shares(codebooks)
    right = _ratios(hits, counts)
    audio = _weighted(means[1:], shares) if options.with_audio else None
    contrastive = pair_sum / pairs if pairs else None
    parts = ((options.text, means[0]), (options.audio, audio), (options.contrastive, contrastive))
    found = {
        "loss": sum(weight * value for weight, value in parts if value is not None),
        "text_loss": means[0],
        "audio_loss": audio,
        "audio_loss_per_codebook": means[1:] if options.with_audio else None,
        "eos_loss": _ratios([sum(eos[:codebooks])], [sum(eos[codebooks:])])[0],
        "text_accuracy": right[0],
        "audio_accuracy": _ratios([sum(hits[1:])], [sum(counts[1:])])[0],
        "audio_accuracy_per_codebook": right[1:] if options.with_audio else None,
        "text_labels": int(counts[0]),
        "audio_labels": int(sum(counts[1:])),
    }
    return found | ({"contrastive_loss": contrastive} if options.contrastive else {})


def _ratios(sums: list[float], counts: list[float]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def _weighted(means: list[float | None], shares: list[float]) -> float | None:
    if all(mean is None for mean in means):
        return None
    return sum(share * (mean or 0.0) for share, mean in zip(shares, means, strict=True))


def max_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: of the GPU, or resident on a CPU; in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Reporter:
    """Writes reports to metrics.jsonl and TensorBoard, and shows them.

    Args:
        folder: the run's output folder.
        total_steps: optimizer steps of the run.
    """

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._folder = folder
        self._file = (folder / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._plain = not sys.stderr.isatty()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=Console(stderr=True), disable=self._plain)
        self._task = self._bar.add_task("", total=total_steps, note="")
        self._total = total_steps
        self._bar.start()

    def step(self, step: int) -> None:
        """A step is done (nothing is read from the device)."""
        self._bar.update(self._task, completed=step)

    def report(self, metrics: dict[str, Any]) -> None:
        """Write one report."""
        self._file.write(json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"{metrics['kind']}/{name}", value, metrics["step"])
        note = self._note(metrics)
        self._bar.update(self._task, note=note)
        if self._plain:
            print(f"{metrics['kind']} step {metrics['step']}/{self._total} {note}", file=sys.stderr, flush=True)

    def _note(self, metrics: dict[str, Any]) -> str:
        parts = [f"{name} {metrics[name]:.4f}" for name in ("text_loss", "audio_loss") if metrics.get(name) is not None]
        if metrics.get("tokens_per_second") is not None:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"wait {metrics['data_wait_fraction']:.1%}")
        return "  ".join(parts)

    def diagnose(self, found: dict[str, Any], step: int) -> None:
        """Show diagnostics, and keep them in diagnostics.jsonl and TensorBoard."""
        with (self._folder / "diagnostics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | found, ensure_ascii=False) + "\n")
        text = as_text(found, step)
        self._board.add_text("diagnostics", f"```\n{text}\n```", step)
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
        self._board.close()
        self._file.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a value becomes a string."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
