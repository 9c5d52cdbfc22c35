"""The trainer's main path: check, load, prove the signal, step, save.

In: a `TrainConfig`. Out: the output folder (config.yaml, metrics.jsonl, checkpoints, samples, the final adapter).
Never: a step that the ranks do not take together; a loss that depends on how many ranks share the work.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

from ..preprocess.checkpoint import load_tokenizer
from ..shards.durable import check_writable, to_json, write_bytes
from ..shards.errors import UserError
from .assemble import build, check, checkpoint_bytes, describe_run
from .checkpoint import VERSION, Snapshot
from .config import TrainConfig
from .data import naming_dead_workers
from .diagnostics import UpdateWatch, fingerprint, look_at_predictions
from .faults import EXIT_REQUEUE, Stopped, together
from .garbage import collected_on_schedule
from .metrics import max_memory_gb
from .output import (
    SELFTEST,
    STOPPED,
    save_config,
    save_trainable,
)
from .profiling import StepProfiler
from .readback import Mark
from .report import Reporter
from .resume import changed_options
from .samples import Speaker
from .saver import Saver
from .selftest import refuse_if_wrong, run_selftest
from .setup import Place, join_world
from .step import Run, Window, take_batches, train_step
from .tools import (
    Tools,
    final_weights,
    finish_saves,
    note,
    report,
    report_noted,
    save,
    save_error,
    save_result,
    say,
)

DRY_STEPS = 2


def train(config: TrainConfig) -> None:
    """Train one stage.

    Raises:
        UserError: bad paths or options, or a checkpoint, adapter and shard set that do not fit together.
        Stopped: by a signal, after a checkpoint.
    """
    config.validate()
    place = join_world()
    together(place.world.rank, lambda: _train(config, place))
    if dist.is_initialized():
        dist.destroy_process_group()


def _train(config: TrainConfig, place: Place) -> None:
    checked = check(config, place)
    run, window, state = build(config, place, checked)
    if place.is_main:
        print(describe_run(run, checked.checkpoint), flush=True)
        for change in changed_options(state, config) if state else ():
            print(f"  changed since the checkpoint: {change}", flush=True)
    if place.is_main and not config.dry_run:
        check_writable(config.output_dir, 3 * checkpoint_bytes(run))
        resolved = {"base_model": str(checked.base), "total_steps": run.total_steps}
        save_config(config, resolved | {"whisper_features": checked.features})
        save_trainable(config.output_dir, run.parameters)
    if not checked.checkpoint:
        prove_signal(run, checked.base)
    if config.dry_run:
        dry_run(run)
        return
    tokenizer = load_tokenizer(checked.base, run.special_ids)
    tools = Tools(tokenizer, fingerprint(run.peft_model.named_parameters()), checked.validation)
    tools.saved_step = run.progress.step
    if place.is_main:
        tools.reporter = Reporter(config, run.total_steps, run.progress.step, state.get("written"))
        tools.saver = Saver(config.output_dir, config.save_total_limit)
    if config.sample_steps:
        tools.speaker = Speaker(run, tokenizer, checked.features)
    if config.profile and place.is_main:
        tools.profiler = StepProfiler(config.output_dir / "profile", place.device)
    with tools.stop.listening(), naming_dead_workers(), collected_on_schedule() as tools.collect:
        run_steps(run, tools, window)
    if tools.profiler:
        tools.profiler.close()
    save_result(run, tools, checked.base)


def prove_signal(run: Run, base: Path) -> None:
    """Print and keep the self-test.

    Raises:
        UserError: the training signal is wrong on some rank, and that is not to be passed over.
    """
    found = run_selftest(run, base)
    if run.place.is_main:
        print("\n".join(found.lines()), flush=True)
        if not run.config.dry_run:
            write_bytes(run.config.output_dir / SELFTEST, to_json(found.to_dict(), indent=1) + b"\n")
    wrong_ranks = run.place.agree([float(bool(found.problems))])[0]
    if wrong_ranks and not run.config.skip_alignment_check:
        refuse_if_wrong(found)
        raise UserError("the training signal looks wrong on another rank; see its message")


def run_steps(run: Run, tools: Tools, window: Window) -> None:
    """Take every step that is left, with its reports, validations, samples and checkpoints."""
    config, progress = run.config, run.progress
    if progress.step == 0 and tools.validation.every:
        report(tools, tools.validation.run(run, base=True))
    if tools.speaker:
        tools.speaker.begin()
    window.began = Mark(run.place.device)
    while progress.step < run.total_steps:
        batches, counts = take_batches(run, window)
        counts = obey(run, tools, window, counts)
        looks = config.diagnostics_steps and (progress.step + 1) % config.diagnostics_steps == 0
        watch = UpdateWatch(run.parameters) if looks else None
        predictions: dict[str, object] = {}
        if watch:
            look = partial(look_at_predictions, tokenizer=tools.tokenizer, options=run.loss)
            predictions = run.look(batches[0], look)
        norm = train_step(run, batches, counts, window, watch)
        report_noted(run, tools)
        step, last = progress.step, progress.step == run.total_steps
        tools.collect(step)
        if tools.profiler and (table := tools.profiler.step()):
            say(tools, table)
        predictions |= watch.norms() if watch else {}
        if tools.reporter:
            tools.reporter.step(step)
            if watch:
                tools.reporter.diagnose(predictions, step)
        if step % config.logging_steps == 0 or step == 1 or last:
            tools.noted = note(run, window, norm)
            window = run.window(tools.noted.ended)
            if not run.place.queues:
                report_noted(run, tools)
        if pause(run, tools, window):
            return


def pause(run: Run, tools: Tools, window: Window) -> bool:
    """Validate, speak and save where that is due, which is no training time; returns whether to stop early."""
    config, progress = run.config, run.progress
    step, last = progress.step, progress.step == run.total_steps
    validates = tools.validation.due(step, run.total_steps)
    speaks = bool(tools.speaker) and (step % config.sample_steps == 0 or last)
    saves = config.save_steps > 0 and (step % config.save_steps == 0 or last)
    if not (validates or speaks or saves or last):
        return False
    report_noted(run, tools)
    with window.pauses.counted():
        stale = validates and validate(run, tools)
        if tools.speaker and (speaks or stale):
            speak(run, tools, tools.speaker)
    if saves or (stale and config.save_steps):
        save(run, tools, window)
    if stale:
        best, at = progress.best_loss, progress.best_step
        found = "no finite loss" if best is None else f"best loss {best:.4f} at {at}"
        say(tools, f"stopped early at step {step}: {found}")
    return stale


def obey(run: Run, tools: Tools, window: Window, counts: list[float]) -> list[float]:
    """What all ranks agree on before a step: label counts, a signal to stop, a checkpoint that is due, failures.

    Returns:
        The label counts of all ranks.

    Raises:
        Stopped: a rank got a signal; there is a checkpoint of the last step.
        UserError: a save failed, or too many steps were not finite.
    """
    config, saver = run.config, tools.saver
    run.bad.read()
    failures = saver.failures() if saver else []
    minutes = (time.monotonic() - tools.saved_at) / 60
    unsaved = run.progress.step != tools.saved_step
    save_due = bool(saver) and unsaved and 0 < config.save_every_minutes <= minutes
    orders = [bool(tools.stop), save_due, bool(failures) and not config.allow_failed_saves, run.bad.too_many]
    agreed = run.place.agree([*counts, *map(float, orders)])
    stop, save_due, failed, bad = (value > 0 for value in agreed[len(counts) :])
    if stop or save_due or failed or bad:
        report_noted(run, tools)
    for failure in failures:
        say(tools, f"error: {failure}")
    if failed:
        _ = saver and saver.finish()
        raise save_error(failures)
    if bad:
        run.bad.refuse()
    if (stop and unsaved) or save_due:
        save(run, tools, window)
    if stop:
        finish_saves(run, tools)
        say(tools, f"stopped by {tools.stop.name or 'a signal to another rank'} at step {run.progress.step}; "
                   "--resume_from_checkpoint auto goes on")  # fmt: skip
        if tools.reporter:
            tools.reporter.close()
            write_bytes(config.output_dir / STOPPED, to_json({"exit_code": EXIT_REQUEUE, "step": run.progress.step}))
        raise Stopped
    return agreed[: len(counts)]


def validate(run: Run, tools: Tools) -> bool:
    """Validate, and keep the best; returns whether to stop early. All ranks find the same."""
    config, progress = run.config, run.progress
    metrics = tools.validation.run(run)
    report(tools, metrics)
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        say(tools, f"warning: the validation loss at step {progress.step} is not finite")
        progress.stale += 1
    elif progress.best_loss is None or loss < progress.best_loss - config.early_stopping_threshold:
        progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
        tensors, texts = final_weights(run)
        if tools.saver:
            state = {"version": VERSION, "step": progress.step, "metrics": metrics}
            tools.saver.best(Snapshot(progress.step, state, tensors, texts))
    else:
        progress.stale += 1
    return 0 < config.early_stopping_patience <= progress.stale


def speak(run: Run, tools: Tools, speaker: Speaker) -> None:
    """Generate samples, and report how they compare with the base model's."""
    name = f"step-{run.progress.step:06d}"
    metrics = speaker.speak(name)
    if metrics and tools.reporter:
        tools.reporter.report(metrics)
        tools.reporter.sounds(speaker.sounds(name), run.progress.step)


def dry_run(run: Run) -> None:
    """Take two steps and print what the run will need."""
    check_writable(run.config.output_dir.parent, 3 * checkpoint_bytes(run))
    window = run.window()
    step_s = 0.0
    for _ in range(DRY_STEPS):
        batches, counts = take_batches(run, window)
        began = time.perf_counter()
        norm = train_step(run, batches, run.place.agree(counts), window)
        float(norm)  # wait for the device
        step_s = time.perf_counter() - began
    run.bad.read(until=run.progress.step)
    kept = run.config.save_total_limit or run.total_steps // max(1, run.config.save_steps)
    if run.place.is_main:
        print(
            f"dry run: {run.total_steps} steps of {step_s:.2f} s, about {run.total_steps * step_s / 3600:.2f} h; "
            f"{max_memory_gb(run.place.device):.1f} GB of memory so far; "
            f"about {(kept + 2) * checkpoint_bytes(run) / 1e9:.2f} GB of disk for {kept} checkpoints, the best and one "
            "being written. Nothing was saved.",
            flush=True,
        )
    run.loader.close()
