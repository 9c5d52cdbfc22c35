"""Validation while training: report it, watch the guards, keep the best weights, stop early.

In: a `Run` and its `RunIO`. Out: metrics, predictions beside targets, the folder `best-STEP`.
Guarantees: all ranks decide the same, from the same sums (test_eval_sets.py).
"""

from __future__ import annotations

import math
from functools import partial

from higgs_tune.shards.errors import UserError
from higgs_tune.train.checkpoint.folder import VERSION, Snapshot
from higgs_tune.train.eval_sets import SAMPLES, EvalMetric, parse_guard, parse_metric
from higgs_tune.train.monitor.diagnostics import compare_predictions
from higgs_tune.train.monitor.samples import SampleGenerator
from higgs_tune.train.monitor.validation import Results
from higgs_tune.train.run_io import RunIO, final_weights
from higgs_tune.train.state import Run


def chosen_metric(run: Run, run_io: RunIO) -> EvalMetric:
    """The metric that chooses the best checkpoint."""
    best_by = run.config.validation.best_by
    return parse_metric("--best_by", best_by) if best_by else EvalMetric(run_io.validation.names[0], "loss")


def validate_base(run: Run, run_io: RunIO) -> None:
    """Validate the base model before the first step, and note its metrics for the guards.

    A resumed run has them from its checkpoint; guards that are new to it are measured now.

    Raises:
        UserError: a metric that is asked for has no labels in its set, or the base model is not at hand any more.
    """
    if not run_io.validation.every:
        return
    guards = [parse_guard(text).metric for text in run.config.validation.guard]
    fresh = run.progress.step == 0
    if not fresh and all(str(metric) in run.progress.base_metrics for metric in guards):
        return
    if not fresh and run.config.lora.full_finetune:
        raise UserError("--guard cannot be added to a full fine-tuning that is resumed: its base model is gone")
    results = run_io.validation.run(run, base=True)
    for metric in (*guards, chosen_metric(run, run_io)):
        if metric.set_name != SAMPLES and metric.value_in(results) is None:
            hint = "Its samples have no label of that kind."
            raise UserError(f"nothing to measure {metric} on", expected="labels of that kind", hint=hint)
    run.progress.base_metrics = {
        f"{name}:{key}": float(value)
        for name, metrics in results.items()
        for key, value in metrics.items()
        if isinstance(value, float)
    }
    if fresh:
        report(run, run_io, results, base=True)


def report(run: Run, run_io: RunIO, results: Results, *, base: bool = False) -> None:
    """Report every set's metrics, then its predictions beside targets; all ranks together."""
    for metrics in results.values():
        run_io.report(metrics)
    probe = partial(compare_predictions, tokenizer=run_io.tokenizer, options=run.loss_options)
    for name, predictions in run_io.validation.look(run, probe, base=base).items():
        if run_io.logger:
            source = f"validation on {name}{', base model' if base else ''}"
            run_io.logger.log_diagnostics({"source": source} | predictions, run.progress.step)


def validate(run: Run, run_io: RunIO) -> str:
    """Validate, and save the best weights; returns why to stop early, or nothing. All ranks return the same."""
    validation = run.config.validation
    results = run_io.validation.run(run)
    report(run, run_io, results)
    if (broken := broken_guards(run, run_io, results)) and validation.guard_action == "stop":
        return f"--guard {', '.join(broken)} is broken"
    metric = chosen_metric(run, run_io)
    return "" if metric.set_name == SAMPLES else keep_best(run, run_io, metric, results)


def generate_samples(run: Run, run_io: RunIO, generator: SampleGenerator) -> str:
    """Generate samples, and report how they compare with the base model's; returns why to stop early, or nothing."""
    name = f"step-{run.progress.step:06d}"
    metrics = generator.generate(name)
    if metrics and run_io.logger:
        run_io.logger.log(metrics)
        run_io.logger.log_audio(generator.sounds(name), run.progress.step)
    metric = chosen_metric(run, run_io) if run.config.validation.best_by else None
    if metric is None or metric.set_name != SAMPLES:
        return ""
    own = float(metrics.get(metric.metric, math.nan)) if metrics else 0.0  # rank 0 alone has metrics
    (value,) = run.context.all_sum([own])
    return keep_best(run, run_io, metric, {SAMPLES: (metrics or {}) | {metric.metric: value}})


def keep_best(run: Run, run_io: RunIO, metric: EvalMetric, results: Results) -> str:
    """Save the weights if they are the best by a metric; returns why to stop early, or nothing."""
    validation, progress = run.config.validation, run.progress
    value, best = metric.value_in(results), progress.best_value
    if value is None or not math.isfinite(value):
        named = metric if metric.set_name == SAMPLES else "the validation loss"
        run_io.say(f"warning: {named} at step {progress.step} is not finite")
        progress.stale += 1
    elif best is None or metric.gain(value, best) > validation.early_stopping_threshold:
        progress.best_value, progress.best_step, progress.stale = value, progress.step, 0
        tensors, texts = final_weights(run)
        if run_io.saver:
            state = {"version": VERSION, "step": progress.step, "best_by": str(metric)}
            state |= {"metrics": results[metric.set_name], "all_metrics": results}
            run_io.saver.best(Snapshot(progress.step, state, tensors, texts))
    else:
        progress.stale += 1
    if 0 < validation.early_stopping_patience <= progress.stale:
        best = progress.best_value
        return (
            f"no finite {metric.metric} on {metric.set_name}"
            if best is None
            else f"best {metric} {best:.4f} at {progress.best_step}"
        )
    return ""


def broken_guards(run: Run, run_io: RunIO, results: Results) -> list[str]:
    """Warn of every guard whose metric is worse than the base model's by more than its tolerance; returns them."""
    broken = []
    for text in run.config.validation.guard:
        guard = parse_guard(text)
        metric, base = guard.metric, run.progress.base_metrics[str(guard.metric)]
        value = metric.value_in(results)
        value = math.nan if value is None else value
        if guard.is_broken(value, base):
            broken.append(text)
            message = (
                f"{metric} is {value:.4f}, worse than the base model's {base:.4f} by {-metric.gain(value, base):.4f}, "
                f"and --guard allows {guard.tolerance:g}: the model forgets what that set stands for. Mix such data in "
                "(--mix_weights), lower --learning_rate, or stop earlier"
            )
            run_io.warn(f"guard {metric}", message)
    return broken
