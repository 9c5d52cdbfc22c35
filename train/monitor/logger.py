"""Logging on rank 0: metrics.jsonl, TensorBoard, trackers, and a live display or plain lines on stderr.

In: dicts of metrics. Out: the log files of the output folder, and text.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from higgs_tune.shards.errors import UserError
from higgs_tune.train.checkpoint.output import DIAGNOSTICS, METRICS
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.eval_sets import HELD_OUT
from higgs_tune.train.monitor.diagnostics import format_diagnostics
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

_PROJECT = "higgs-tune"
_BUILT_IN = {"tensorboard", "none"}
SPECTRUM_BINS = 512
ESTIMATE_S = 3600.0  # steps of this time give the time left; a step may take minutes


class MetricsLogger:
    """Writes metrics and shows them.

    Args:
        config: the run's options.
        total_steps: optimizer steps of the run.
        step: steps done before this start.
        written: bytes of each log file at that step; lines after them are removed, since the run repeats their steps.

    Raises:
        UserError: a tracker is not installed.
    """

    def __init__(
        self, config: TrainConfig, total_steps: int, step: int = 0, written: dict[str, int] | None = None
    ) -> None:
        self._folder, self._total, self._step = config.output_dir, total_steps, step
        for name in (METRICS, DIAGNOSTICS):
            _cut(self._folder / name, (written or {}).get(name, 0))
        trackers = config.reports.report_to
        self._file = (self._folder / METRICS).open("a", buffering=1)
        purge_step = step + 1 if step else None
        folder = str(self._folder / "tensorboard")
        self._board = None if "none" in trackers else SummaryWriter(folder, purge_step=purge_step)
        self._trackers = [_start(name, config) for name in trackers if name not in _BUILT_IN]
        self._plain = not sys.stderr.isatty()
        self._console = Console(stderr=True, soft_wrap=self._plain)
        times = (TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Bar(BarColumn(None), MofNCompleteColumn(), *times, speed_estimate_period=ESTIMATE_S)
        self._task = self._bar.add_task("", total=total_steps, completed=step)
        self._shown: dict[str, dict[str, Any]] = {}
        self._live = None if self._plain else Live(self._view(), console=self._console, refresh_per_second=4)
        if self._live:
            self._live.start()

    @property
    def bytes_written(self) -> dict[str, int]:
        """Size of each log file."""
        paths = (self._folder / name for name in (METRICS, DIAGNOSTICS))
        return {path.name: path.stat().st_size for path in paths if path.exists()}

    def advance(self, step: int) -> None:
        """Move the progress bar; reads nothing from the device."""
        self._bar.update(self._task, completed=step)

    def log(self, metrics: dict[str, Any]) -> None:
        """Write one line of metrics.jsonl, to the trackers too, and show it."""
        self._file.write(json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n")
        name_of_set = metrics.get("set", HELD_OUT)
        title, step = (
            metrics["kind"] if name_of_set == HELD_OUT else f"{metrics['kind']} {name_of_set}",
            metrics["step"],
        )
        tagged = {f"{title.replace(' ', '/')}/{name}": value for name, value in _numbers(metrics)}
        if self._board:
            for name, value in tagged.items():
                self._board.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(tagged, step=step)
        self._shown[title], self._step = metrics, step
        if self._live:
            self._live.update(self._view())
        else:
            print(f"{title} step {step}/{self._total} {_line(metrics)}", file=sys.stderr, flush=True)

    def warn(self, name: str, message: str) -> None:
        """Write a warning to metrics.jsonl and TensorBoard, and show it."""
        step = self._step
        line = {"kind": "warning", "step": step, "name": name, "message": message}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self._board:
            self._board.add_text("warnings", f"{name}: {message}", step)
        self.show(f"warning: step {step}: {message}")

    def log_diagnostics(self, diagnostics: dict[str, Any], step: int) -> None:
        """Write diagnostics to diagnostics.jsonl and TensorBoard, and show them."""
        with (self._folder / DIAGNOSTICS).open("a") as file:
            file.write(json.dumps({"step": step} | diagnostics, ensure_ascii=False) + "\n")
        text = format_diagnostics(diagnostics, step)
        if self._board:
            self._board.add_text("diagnostics", f"```\n{text}\n```", step)
        self.show(text)

    def log_audio(self, clips: Iterable[tuple[str, np.ndarray, int]], step: int) -> None:
        """Write waveforms and their spectrograms to TensorBoard."""
        if not self._board:
            return
        for name, wave_S, rate in clips:
            self._board.add_audio(name, wave_S[None], step, sample_rate=rate)
            self._board.add_image(f"{name}/spectrogram", spectrogram(wave_S), step)

    def show(self, text: str) -> None:
        """Show a line."""
        if self._live:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
        for tracker in self._trackers:
            tracker.finish()
        if self._board:
            self._board.close()
        self._file.close()

    def _view(self) -> Group:
        """The live display: the last metrics of each kind above a progress bar."""
        lines = []
        for kind, metrics in self._shown.items():
            first, *more = _lines([f"{kind} {metrics['step']}", *_cells(metrics)], self._console.width)
            lines += [Text(first, style="bold"), *map(Text, more)]
        return Group(*lines, self._bar)


def check_trackers(names: Iterable[str]) -> None:
    """Check that the trackers are installed.

    Raises:
        UserError: one is not.
    """
    for name in set(names) - _BUILT_IN:
        _module_of(name)


def _cut(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _module_of(tracker: str) -> Any:
    try:
        return importlib.import_module(tracker)
    except ImportError as error:
        hint = f"pip install 'higgs-tune[{tracker}]'"
        raise UserError(f"--report_to {tracker} is not installed", hint=hint) from error


def _start(name: str, config: TrainConfig) -> Any:
    """Start a tracker's run; every tracker has `log` and `finish`."""
    tracker = _module_of(name)
    options = {
        "project": os.environ.get("WANDB_PROJECT", _PROJECT),
        "name": config.reports.run_name or config.output_dir.name,
    }
    options |= {"config": config.plain()}
    if name == "wandb":
        return tracker.init(**options, dir=str(config.output_dir))
    return tracker.init(**options) or tracker


def _numbers(metrics: dict[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in metrics.items():
        if name == "step" or isinstance(value, str):
            continue
        if isinstance(value, list):
            yield from ((f"{name}/{i}", item) for i, item in enumerate(value) if item is not None)
        elif isinstance(value, dict):
            yield from ((f"{name}/{key}", item) for key, item in value.items())
        elif value is not None:
            yield name, value


_SHOWN = (
    ("text_loss", "text {:.4f}"),
    ("audio_loss", "audio {:.4f}"),
    ("contrastive_loss", "contrastive {:.4f}"),
    ("eos_loss", "eos {:.3f}"),
    ("text_labels", "{:,} text labels"),
    ("audio_labels", "{:,} audio labels"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("audio_hours_per_gpu_hour", "{:.0f} h/GPU-h"),
    ("data_wait_fraction", "wait {:.1%}"),
    ("max_memory_gb", "{:.1f} GB"),
    ("text_accuracy", "text right {:.1%}"),
    ("audio_accuracy", "audio right {:.1%}"),
    ("run_on_rate", "run on {:.0%}"),
    ("base_run_on_rate", "(base {:.0%})"),
    ("duration_ratio", "duration {:.2f}"),
    ("base_duration_ratio", "(base {:.2f})"),
    ("silence_ratio", "silence {:.0%}"),
    ("base_silence_ratio", "(base {:.0%})"),
)


def _cells(metrics: dict[str, Any]) -> list[str]:
    return [form.format(metrics[name]) for name, form in _SHOWN if isinstance(metrics.get(name), int | float)]


def _lines(cells: list[str], width: int) -> list[str]:
    """Cells in lines of at most `width` characters; those after the first are indented."""
    lines = [cells[0]]
    for cell in cells[1:]:
        if len(lines[-1]) + 2 + len(cell) > width:
            lines.append("")
        lines[-1] += f"  {cell}"
    return lines


def _line(metrics: dict[str, Any]) -> str:
    return "  ".join(_cells(metrics))


def _finite(value: Any) -> Any:
    """JSON has no NaN, so such a value becomes a string."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def spectrogram(wave_S: np.ndarray) -> np.ndarray:
    """Levels from -80 dB (black) to the loudest (white): uint8 [1, bins, frames], low frequencies at the bottom."""
    wave = torch.from_numpy(wave_S)
    window = torch.hann_window(2 * SPECTRUM_BINS)
    hop = SPECTRUM_BINS // 2
    level = torch.stft(wave, 2 * SPECTRUM_BINS, hop, window=window, return_complex=True, pad_mode="constant").abs()
    db = 20 * torch.log10(level + 1e-6)
    scaled = ((db - db.max()).clamp(min=-80) / 80 + 1) * 255
    return scaled.flip(0).byte()[None].numpy()
