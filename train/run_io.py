"""Logging and checkpointing around the training loop.

In: a `Run`. Out: metrics for people, checkpoint folders, the final adapter. Guarantees: all ranks enter a save
together (test_resume.py); a metric is reported once (test_long_runs.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from higgs_tune.preprocess.checkpoints.training_record import RECORD
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.train.checkpoint.folder import Saver
from higgs_tune.train.checkpoint.output import (
    ADAPTER,
    FULL,
    METRICS,
    SELFTEST,
    adapter_tensors,
    save_adapter,
    save_config,
    save_trainable,
    stored_dtype,
    whole_weights,
    write_model,
)
from higgs_tune.train.checkpoint.resume import snapshot, texts_beside
from higgs_tune.train.dist.device_timing import HostCopy, Timestamp
from higgs_tune.train.dist.signals import StopSignal
from higgs_tune.train.metrics import loss_metrics, max_memory_gb
from higgs_tune.train.model.flops import Rows, model_flops, peak_of
from higgs_tune.train.model.loss import LossSums
from higgs_tune.train.monitor.diagnostics import assert_frozen
from higgs_tune.train.monitor.logger import MetricsLogger
from higgs_tune.train.monitor.profiling import StepProfiler
from higgs_tune.train.monitor.samples import SampleGenerator
from higgs_tune.train.monitor.selftest import SelfTestResult
from higgs_tune.train.monitor.system import SystemMonitor
from higgs_tune.train.monitor.validation import Validation
from higgs_tune.train.monitor.watch import CollapseWatch
from higgs_tune.train.optim import reported_rates, warmup_of
from higgs_tune.train.resolve import Inputs
from higgs_tune.train.state import Run, StepStats
from peft import PeftModel
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PendingMetrics:
    """A logging interval that has ended for the host, while the device may still be computing it.

    step: its last step. known: the metrics that the host knows already. ended: its end. values: the packed `LossSums`,
    then the gradient norm of the last step. damaged: damaged samples of this rank so far.
    """

    step: int
    known: dict[str, object]
    stats: StepStats
    ended: Timestamp
    values: HostCopy
    damaged: int


@dataclass
class RunIO:
    """Everything around the steps.

    logger, saver, system, watch: on rank 0 only. sample_generator: where samples are generated. frozen: fingerprints of
    the parameters that must not change. collect_garbage: called after each step with its number. saved_at: by
    `time.monotonic`.
    """

    tokenizer: PreTrainedTokenizerBase
    frozen: dict[str, tuple[str, int]]
    validation: Validation
    stop: StopSignal
    logger: MetricsLogger | None = None
    saver: Saver | None = None
    system: SystemMonitor | None = None
    watch: CollapseWatch | None = None
    sample_generator: SampleGenerator | None = None
    profiler: StepProfiler | None = None
    pending: PendingMetrics | None = None
    collect_garbage: Callable[[int], None] = lambda _step: None
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0

    def report(self, metrics: dict[str, object]) -> None:
        """Write and show metrics, and what the watch says of them, on rank 0."""
        if self.logger:
            self.logger.log(metrics)
            for name, message in self.watch.look(metrics) if self.watch else ():
                self.warn(name, message)

    def warn(self, name: str, message: str) -> None:
        """Write and show a warning, on rank 0."""
        if self.logger:
            self.logger.warn(name, message)

    def say(self, text: str) -> None:
        """Show a line, on rank 0."""
        if self.logger:
            self.logger.show(text)

    def close(self) -> None:
        """End display, logs and profile; a second time does nothing."""
        if self.profiler:
            self.profiler.close()
        if self.logger:
            self.logger.close()
        self.profiler = self.logger = None


def save_records(run: Run, inputs: Inputs, selftest: SelfTestResult | None) -> None:
    """Write config.yaml, higgs_tune.json, trainable.json, and selftest.json at a fresh start."""
    folder = run.config.output_dir
    resolved = {"base_model": str(inputs.base), "total_steps": run.total_steps, "whisper_features": inputs.features}
    resolved["whisper_path"] = str(inputs.tower.folder) if inputs.tower else None
    save_config(run.config, resolved)
    assert run.record
    durable.write_bytes(folder / RECORD, run.record.to_bytes())
    save_trainable(folder, run.parameters)
    if selftest:
        durable.write_bytes(folder / SELFTEST, durable.to_json(selftest.to_dict(), indent=1) + b"\n")


def make_watch(run: Run) -> CollapseWatch:
    """The collapse watch of a run, whose log is open."""
    model = run.model
    watch = CollapseWatch(model.vocab_size, model.audio_codebook_size, warmup_of(run.config.optim, run.total_steps))
    try:
        watch.resume(run.config.output_dir / METRICS)
    except UserError as error:  # a machine that went down can leave a damaged log: no reason to stop
        print(f"warning: the collapse watch begins anew: {error}", file=sys.stderr, flush=True)
    return watch


def queue_metrics(run: Run, stats: StepStats, norm: torch.Tensor) -> PendingMetrics:
    """End a logging interval without waiting for the device."""
    step = run.progress.step
    known: dict[str, object] = {
        "kind": "train",
        "step": step,
        "epoch": run.epochs_done,
        **reported_rates(run.optimizer),
        "data_wait_s": run.loader.waits.summary(),
    }
    values = HostCopy(torch.cat([stats.packed_sums, norm.detach().double().view(1)]))
    return PendingMetrics(step, known, stats, Timestamp(run.context.device), values, len(run.loader.damaged))


def report_pending(run: Run, run_io: RunIO) -> None:
    """Report the queued metrics, if there are any.

    On a GPU this is called once the next step is queued, so that the device works while the host waits for the numbers.
    """
    if run_io.pending:
        run_io.report(summarise(run, run_io.pending, run_io.system))
        run_io.pending = None


def summarise(run: Run, pending: PendingMetrics, system: SystemMonitor | None = None) -> dict[str, object]:
    """Sum an interval over all ranks and name its numbers. Waits for the device; all ranks call this together."""
    context, stats = run.context, pending.stats
    *packed, norm = pending.values.wait().tolist()
    elapsed_s = stats.began.seconds_until(pending.ended) - stats.pauses.seconds()
    run.bad_steps.collect(until=pending.step)
    of_rank = [stats.positions, stats.samples, stats.audio_s, stats.waits.seconds(), pending.damaged]
    values = context.all_sum([*packed, *of_rank, stats.audio_rows, stats.squares, stats.windows])
    positions, samples, audio_s, wait_s, damaged, audio_rows, squares, windows = values[len(packed) :]
    losses = loss_metrics(LossSums.unpack(torch.tensor(values[: len(packed)]), run.codebooks), run.loss_options)
    labels = (losses["text_labels"], losses["audio_labels"] / run.codebooks)
    peak = peak_of(context.device)
    rows = Rows(positions, positions - audio_rows, audio_rows, squares, *labels, windows)
    flops = model_flops(run.model, rows) if peak else 0
    return {
        **pending.known,
        **losses,
        "grad_norm": norm,
        "tokens_per_second": positions / elapsed_s,
        "samples_per_second": samples / elapsed_s,
        "audio_hours_per_gpu_hour": audio_s / elapsed_s / context.world.size,
        "data_wait_fraction": wait_s / context.world.size / elapsed_s,
        "bad_samples": int(damaged),
        "bad_steps": run.bad_steps.count,
        "step_time_s": elapsed_s / stats.steps,
        "max_memory_gb": max_memory_gb(context.device),
        **(system.read() if system else {}),
        **({"mfu": flops / elapsed_s / context.world.size / peak} if peak else {}),
    }


def save(run: Run, run_io: RunIO, stats: StepStats) -> None:
    """Begin to save a checkpoint, after a check that frozen parameters have not changed; all ranks together."""
    assert_frozen(run.peft_model, run_io.frozen)
    run.bad_steps.collect(until=run.progress.step)
    with stats.pauses.timed():
        taken = snapshot(run, stats, run_io.logger.bytes_written if run_io.logger else {})
        if run_io.saver and taken:
            run_io.saver.checkpoint(taken)
    run_io.saved_at, run_io.saved_step = time.monotonic(), run.progress.step


def finish_saves(run: Run, run_io: RunIO) -> None:
    """Wait until every save is on disk; all ranks together.

    Raises:
        UserError: a save failed.
    """
    failures = run_io.saver.finish() if run_io.saver else []
    for failure in failures:
        run_io.say(f"error: {failure}")
    if run.context.all_sum([float(len(failures))])[0] and not run.config.checkpoints.allow_failed_saves:
        raise save_error(failures)


def save_error(failures: list[str]) -> UserError:
    """The error that every rank raises when a save has failed; only rank 0 knows the reason."""
    hint = "--allow_failed_saves trains on without."
    return UserError(f"a checkpoint could not be saved: {'; '.join(failures) or 'see rank 0'}", hint=hint)


def final_weights(run: Run) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, bytes]]:
    """The adapter's files, with the moving average's weights where one is kept. All ranks together."""
    with run.averaged_weights():
        tensors = adapter_tensors(run.peft_model, run.parameters)
    name = ADAPTER if isinstance(run.peft_model, PeftModel) else FULL
    return {name: tensors}, texts_beside(run, run.config.output_dir / "best")


def save_result(run: Run, run_io: RunIO, base: Path) -> None:
    """Write the final adapter, or the whole model where every weight trains."""
    finish_saves(run, run_io)
    assert_frozen(run.peft_model, run_io.frozen)
    config, peft_model = run.config, run.peft_model
    if isinstance(peft_model, PeftModel):
        tensors, _ = final_weights(run)
        if run.context.is_main:
            save_adapter(peft_model, run.tower, tensors[ADAPTER], config.output_dir)
    else:
        weights = whole_weights(run.model, stored_dtype(run.model))
        if run.context.is_main:
            write_model(config.output_dir, run.model.config, weights, base)
    run_io.close()
    if run.context.is_main:
        what = "adapter" if isinstance(peft_model, PeftModel) else "model"
        print(f"{what} saved in {config.output_dir}", flush=True)
    run.loader.close()
