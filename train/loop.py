"""The trainer's main path: check the inputs, load the model, self-test, take the steps, save the result.

In: a `TrainConfig`. Out: the output folder (config.yaml, metrics.jsonl, checkpoints, samples, the final adapter).
Guarantees: all ranks take every step, validation and save together (test_faults.py).
"""

from __future__ import annotations

import sys
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer
from higgs_tune.shards.durable import check_writable, to_json, write_bytes
from higgs_tune.shards.errors import UserError
from higgs_tune.train.build import build_run, checkpoint_bytes, describe_run
from higgs_tune.train.checkpoint.find import find_checkpoint, keep_lora_options
from higgs_tune.train.checkpoint.folder import Saver
from higgs_tune.train.checkpoint.output import STOPPED
from higgs_tune.train.checkpoint.output_folder import check_apart, claimed, earlier_files, remove_files, size_of
from higgs_tune.train.checkpoint.resume import changed_options
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.loader import naming_dead_workers
from higgs_tune.train.dist.context import DistContext, init_distributed
from higgs_tune.train.dist.device_timing import Timestamp
from higgs_tune.train.dist.faults import propagate_failures
from higgs_tune.train.dist.gc_schedule import scheduled_gc
from higgs_tune.train.dist.signals import EXIT_INTERRUPTED, EXIT_REQUEUE, Stopped, StopSignal
from higgs_tune.train.dry_run import dry_run
from higgs_tune.train.monitor.diagnostics import UpdateNorms, compare_predictions, fingerprint
from higgs_tune.train.monitor.logger import MetricsLogger
from higgs_tune.train.monitor.profiling import StepProfiler
from higgs_tune.train.monitor.samples import SampleGenerator
from higgs_tune.train.monitor.selftest import SelfTestResult, raise_if_wrong, run_selftest
from higgs_tune.train.monitor.system import SystemMonitor
from higgs_tune.train.record import make_record
from higgs_tune.train.resolve import Inputs, input_folders, resolve_inputs
from higgs_tune.train.run_io import (
    RunIO,
    finish_saves,
    make_watch,
    queue_metrics,
    report_pending,
    save,
    save_error,
    save_records,
    save_result,
)
from higgs_tune.train.set_checks import layout_warning
from higgs_tune.train.state import Run, StepStats
from higgs_tune.train.step import take_batches, train_step
from higgs_tune.train.validate import generate_samples, validate, validate_base


def train(config: TrainConfig) -> None:
    """Train one stage.

    Raises:
        UserError: bad paths or options, or a checkpoint, adapter and shard set that do not fit together.
        Stopped: by a signal, after a checkpoint.
    """
    config.validate()
    context = init_distributed()
    propagate_failures(context.world.rank, lambda: _train(config, context))
    if dist.is_initialized():
        dist.destroy_process_group()


def _train(config: TrainConfig, context: DistContext) -> None:
    # 1. check everything that needs no weights
    inputs = resolve_inputs(config, context)
    folders = input_folders(config, inputs)
    check_apart(config.output_dir, folders)
    writes = context.is_main and not config.dry_run
    with claimed(config.output_dir) if writes else nullcontext():
        checkpoint = find_checkpoint(config, context)
        config = keep_lora_options(config, checkpoint) if checkpoint else config
        earlier = earlier_files(config, checkpoint) if writes else []
        # 2. load the model, or restore a checkpoint
        run, stats, state = build_run(config, context, inputs, checkpoint)
        if context.is_main:
            print(describe_run(run, checkpoint), flush=True)
            for change in changed_options(state, config) if state else ():
                print(f"  changed since the checkpoint: {change}", flush=True)
            run.record = make_record(inputs.schedule.sets.sets, config.training_stage, inputs.base, inputs.adapter)
            if warning := layout_warning(run.record.layouts, config.training_stage):
                print(warning, file=sys.stderr, flush=True)
        if writes:
            check_writable(config.output_dir, max(0, 3 * checkpoint_bytes(run) - size_of(earlier)))
        # 3. prove that the training signal is right
        selftest = None if checkpoint else self_test(run, inputs.base)
        if config.dry_run:
            dry_run(run)
            return
        run_io = make_run_io(run, inputs)
        # 4. write to the output folder from here on
        if writes:
            resumed = {"--resume_from_checkpoint": checkpoint} if checkpoint else {}
            remove_files(earlier, folders | resumed)
            save_records(run, inputs, selftest)
            run_io.logger = MetricsLogger(config, run.total_steps, run.progress.step, state.get("written"))
            run_io.saver = Saver(config.output_dir, config.checkpoints.save_total_limit, run_io.say)
            run_io.system = SystemMonitor(config.output_dir, context.device)
            run_io.watch = make_watch(run)
            if config.reports.profile:
                run_io.profiler = StepProfiler(config.output_dir / "profile", context.device)
        # 5. take the steps
        with run_io.stop.installed(), closing(run_io):
            with naming_dead_workers(), scheduled_gc() as run_io.collect_garbage:
                run_steps(run, run_io, stats)
            # 6. save the result
            save_result(run, run_io, inputs.base)


def make_run_io(run: Run, inputs: Inputs) -> RunIO:
    """Everything around the steps that reads; logger, saver and profiler join on rank 0."""
    tokenizer = load_tokenizer(inputs.base, run.special_ids)
    stop = StopSignal(announces=run.context.is_main)
    run_io = RunIO(tokenizer, fingerprint(run.peft_model.named_parameters()), inputs.validation, stop)
    run_io.saved_step = run.progress.step
    if run.config.validation.sample_steps:
        run_io.sample_generator = SampleGenerator(run, tokenizer, inputs.features)
    return run_io


def self_test(run: Run, base: Path) -> SelfTestResult:
    """Run the self-test before the first step, and print it.

    Raises:
        UserError: the training signal is wrong on some rank, and --skip_alignment_check is not given.
    """
    result = run_selftest(run, base)
    if run.context.is_main:
        print("\n".join(result.lines()), flush=True)
    wrong_ranks = run.context.all_sum([float(bool(result.problems))])[0]
    if wrong_ranks and not run.config.skip_alignment_check:
        raise_if_wrong(result)
        raise UserError("the training signal looks wrong on another rank; see its message")
    return result


def run_steps(run: Run, run_io: RunIO, stats: StepStats) -> None:
    """Take every step that is left, with its reports, validations, samples and checkpoints."""
    config, progress = run.config, run.progress
    validate_base(run, run_io)
    if run_io.sample_generator:
        run_io.sample_generator.begin()
    stats.began = Timestamp(run.context.device)
    while progress.step < run.total_steps:
        batches, own_counts = take_batches(run, stats)
        agreement = sync_ranks(run, run_io, own_counts)
        act_on(agreement, run, run_io, stats)
        watch = predictions = None
        if config.reports.diagnostics_steps and (progress.step + 1) % config.reports.diagnostics_steps == 0:
            watch = UpdateNorms(run.parameters)
            probe = partial(compare_predictions, tokenizer=run_io.tokenizer, options=run.loss_options)
            predictions = run.probe(batches[0], probe)
        norm = train_step(run, batches, agreement.label_counts, stats, watch)
        report_pending(run, run_io)
        run_io.collect_garbage(progress.step)
        if run_io.profiler and (table := run_io.profiler.step()):
            run_io.say(table)
        update_norms = watch.norms() if watch else {}
        if run_io.logger:
            run_io.logger.advance(progress.step)
            if predictions:
                run_io.logger.log_diagnostics(predictions | update_norms, progress.step)
        if progress.step % config.reports.logging_steps == 0 or progress.step in (1, run.total_steps):
            run_io.pending = queue_metrics(run, stats, norm)
            stats = run.new_stats(run_io.pending.ended)
            if not run.context.is_asynchronous:
                report_pending(run, run_io)
        if pause(run, run_io, stats):
            return


def pause(run: Run, run_io: RunIO, stats: StepStats) -> bool:
    """Validate, generate samples and save where due, off the training clock; returns whether to stop early."""
    config, progress = run.config, run.progress
    step, is_last = progress.step, progress.step == run.total_steps
    validates = run_io.validation.due(step, run.total_steps)
    samples = bool(run_io.sample_generator) and (step % config.validation.sample_steps == 0 or is_last)
    saves = config.checkpoints.save_steps > 0 and (step % config.checkpoints.save_steps == 0 or is_last)
    if not (validates or samples or saves or is_last):
        return False
    report_pending(run, run_io)
    with stats.pauses.timed():
        stops = validate(run, run_io) if validates else ""
        if run_io.sample_generator and (samples or stops):
            stops = generate_samples(run, run_io, run_io.sample_generator) or stops
    if saves or (stops and config.checkpoints.save_steps):
        save(run, run_io, stats)
    if stops:
        run_io.say(f"stopped early at step {step}: {stops}")
    return bool(stops)


@dataclass(frozen=True)
class Agreement:
    """What all ranks know before a step.

    label_counts: [2 + K], summed over ranks. stop: a rank got a signal. interrupt: it was Ctrl-C.
    save_due: a checkpoint is due by time. save_failed: a save failed, and that ends the run.
    too_many_bad_steps: more than --max_bad_steps. failures: messages of failed saves, on rank 0 only.
    """

    label_counts: list[float]
    stop: bool
    interrupt: bool
    save_due: bool
    save_failed: bool
    too_many_bad_steps: bool
    failures: list[str]


def sync_ranks(run: Run, run_io: RunIO, own_counts: list[float]) -> Agreement:
    """Exchange label counts and flags between all ranks, once a step, on the host."""
    config, saver = run.config, run_io.saver
    run.bad_steps.collect()
    failures = saver.failures() if saver else []
    unsaved = run.progress.step != run_io.saved_step
    minutes = (time.monotonic() - run_io.saved_at) / 60
    save_due = bool(saver) and unsaved and 0 < config.checkpoints.save_every_minutes <= minutes
    save_failed = bool(failures) and not config.checkpoints.allow_failed_saves
    own_flags = [bool(run_io.stop), run_io.stop.is_interrupt, save_due, save_failed, run.bad_steps.too_many]
    sums = run.context.all_sum([*own_counts, *map(float, own_flags)])
    stop, interrupt, save_due, save_failed, too_many = (total > 0 for total in sums[len(own_counts) :])
    return Agreement(sums[: len(own_counts)], stop, interrupt, save_due, save_failed, too_many, failures)


def act_on(agreement: Agreement, run: Run, run_io: RunIO, stats: StepStats) -> None:
    """Save, stop or fail, as all ranks have agreed.

    Raises:
        Stopped: a rank got a signal; a checkpoint of the last step is on disk.
        UserError: a save failed, or too many steps were not finite.
    """
    if agreement.stop or agreement.save_due or agreement.save_failed or agreement.too_many_bad_steps:
        report_pending(run, run_io)
    for failure in agreement.failures:
        run_io.say(f"error: {failure}")
    if agreement.save_failed:
        _ = run_io.saver and run_io.saver.finish()
        raise save_error(agreement.failures)
    if agreement.too_many_bad_steps:
        run.bad_steps.raise_error()
    if agreement.save_due or (agreement.stop and run.progress.step != run_io.saved_step):
        save(run, run_io, stats)
    if agreement.stop:
        finish_saves(run, run_io)
        stop_run(run, run_io, interrupt=agreement.interrupt)


def stop_run(run: Run, run_io: RunIO, *, interrupt: bool) -> NoReturn:
    """End the run after a stop signal; stopped.json tells scripts to start it again, unless a person ended it."""
    step, signal_name = run.progress.step, run_io.stop.name or "a signal to another rank"
    message = f"stopped by {signal_name} at step {step}; --resume_from_checkpoint auto goes on"
    run_io.say(message)
    exit_code = EXIT_INTERRUPTED if interrupt else EXIT_REQUEUE
    run_io.close()
    if run.context.is_main and not interrupt:
        write_bytes(run.config.output_dir / STOPPED, to_json({"exit_code": exit_code, "step": step}))
    raise Stopped(message, exit_code)
