"""What works beside the steps: a run's reports, and what it saves, checkpoints on the way and the adapter at the end.

In: a `Run`. Out: lines for people, folders and files. Never: a save on one rank that the others do not know of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..shards.errors import UserError
from .cost import Rows, model_flops, peak_of
from .diagnostics import assert_frozen
from .faults import StopFlag
from .metrics import loss_metrics, max_memory_gb
from .output import (
    ADAPTER,
    ADAPTER_CONFIG,
    FULL,
    adapter_config_json,
    adapter_tensors,
    save_adapter,
    whole_weights,
    write_model,
)
from .profiling import StepProfiler
from .readback import Mark, Readback
from .report import Reporter
from .resume import snapshot
from .samples import Speaker
from .saver import Saver
from .step import Run, Window
from .validation import Validation


@dataclass(frozen=True)
class Noted:
    """A window's metrics to report. step: its last. known: those that the host knew then. damaged: samples so far.

    ended: where the window did. values: `Window.total`, then the gradient norm of the last step.
    """

    step: int
    known: dict[str, object]
    window: Window
    ended: Mark
    values: Readback
    damaged: int


@dataclass
class Tools:
    """What works beside the steps. reporter and saver: on rank 0 only. speaker: where samples are generated."""

    tokenizer: PreTrainedTokenizerBase
    frozen: dict[str, tuple[str, int]]
    validation: Validation
    stop: StopFlag = field(default_factory=StopFlag)
    reporter: Reporter | None = None
    saver: Saver | None = None
    speaker: Speaker | None = None
    profiler: StepProfiler | None = None
    noted: Noted | None = None
    collect: Callable[[int], None] = lambda _step: None
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0


def report(tools: Tools, metrics: dict[str, object]) -> None:
    if tools.reporter:
        tools.reporter.report(metrics)


def note(run: Run, window: Window, norm: torch.Tensor) -> Noted:
    """The metrics of a window that ends here, as far as the host knows them; the device may not have come so far."""
    step = run.progress.step
    known: dict[str, object] = {
        "kind": "train",
        "step": step,
        "epoch": run.epochs_done,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "data_wait_s": run.loader.waits.summary(),
    }
    values = Readback(torch.cat([window.total, norm.detach().double().view(1)]))
    return Noted(step, known, window, Mark(run.place.device), values, len(run.loader.damaged))


def report_noted(run: Run, tools: Tools) -> None:
    """Report what was noted, if there is something. On a GPU that is once the next step is queued, so that the device
    has work while the host waits for its numbers."""
    if tools.noted:
        report(tools, summarise(run, tools.noted))
        tools.noted = None


def summarise(run: Run, noted: Noted) -> dict[str, object]:
    """Sum a window over all ranks and name its numbers. This is where the device is waited for."""
    size, window, (*stats, norm) = run.place.world.size, noted.window, noted.values.wait().tolist()
    elapsed = window.began.until(noted.ended) - window.pauses.seconds()
    run.bad.read(until=noted.step)
    host = [window.positions, window.samples, window.seconds, window.waits.seconds(), noted.damaged]
    values = run.place.agree([*stats, *host, window.audio_rows, window.squares])
    positions, samples, seconds, wait_s, damaged, audio_rows, squares = values[len(stats) :]
    losses = loss_metrics(values[: len(stats)], run.loss)
    labels = (losses["text_labels"], losses["audio_labels"] / run.codebooks)
    peak = peak_of(run.place.device)
    flops = model_flops(run.model, Rows(positions, positions - audio_rows, audio_rows, squares, *labels)) if peak else 0
    return {
        **noted.known,
        **losses,
        "grad_norm": norm,
        "tokens_per_second": positions / elapsed,
        "samples_per_second": samples / elapsed,
        "audio_hours_per_gpu_hour": seconds / elapsed / size,
        "data_wait_fraction": wait_s / size / elapsed,
        "bad_samples": int(damaged),
        "bad_steps": run.bad.count,
        "step_time_s": elapsed / window.steps,
        "max_memory_gb": max_memory_gb(run.place.device),
        **({"mfu": flops / elapsed / size / peak} if peak else {}),
    }


def say(tools: Tools, text: str) -> None:
    if tools.reporter:
        tools.reporter.say(text)


def save(run: Run, tools: Tools, window: Window) -> None:
    """Begin to save a checkpoint; what is frozen has not changed until then."""
    assert_frozen(run.peft_model, tools.frozen)
    run.bad.read(until=run.progress.step)
    with window.pauses.counted():
        taken = snapshot(run, window, tools.reporter.written if tools.reporter else {})
        if tools.saver and taken:
            tools.saver.checkpoint(taken)
    tools.saved_at, tools.saved_step = time.monotonic(), run.progress.step


def finish_saves(run: Run, tools: Tools) -> None:
    """Wait until everything is on disk; all ranks together.

    Raises:
        UserError: a save failed.
    """
    failures = tools.saver.finish() if tools.saver else []
    for failure in failures:
        say(tools, f"error: {failure}")
    if run.place.agree([float(len(failures))])[0] and not run.config.allow_failed_saves:
        raise save_error(failures)


def save_error(failures: list[str]) -> UserError:
    """What every rank raises when a save has failed; only rank 0 knows why."""
    hint = "--allow_failed_saves trains on without."
    return UserError(f"a checkpoint could not be saved: {'; '.join(failures) or 'see rank 0'}", hint=hint)


def final_weights(run: Run) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, bytes]]:
    """Adapter files: the averaged weights where there is an average. All ranks together."""
    with run.averaged():
        tensors = adapter_tensors(run.peft_model, run.parameters)
    if not isinstance(run.peft_model, PeftModel):
        return {FULL: tensors}, {}
    return {ADAPTER: tensors}, {ADAPTER_CONFIG: adapter_config_json(run.peft_model)}


def save_result(run: Run, tools: Tools, base: Path) -> None:
    """Write the final adapter, or the whole model where every weight has trained."""
    finish_saves(run, tools)
    assert_frozen(run.peft_model, tools.frozen)
    config, peft_model = run.config, run.peft_model
    if isinstance(peft_model, PeftModel):
        tensors, _ = final_weights(run)
        if run.place.is_main:
            save_adapter(peft_model, tensors[ADAPTER], config.output_dir)
    else:
        dtype = run.model.config.torch_dtype or torch.bfloat16
        weights = whole_weights(run.model, dtype)
        if run.place.is_main:
            write_model(config.output_dir, run.model.config, weights, base)
    if tools.reporter:
        tools.reporter.close()
        what = "adapter" if isinstance(peft_model, PeftModel) else "model"
        print(f"{what} saved in {config.output_dir}", flush=True)
    run.loader.close()
