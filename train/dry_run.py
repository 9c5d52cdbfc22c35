"""--dry_run: two steps, and what the run will take, measured beside the estimate."""

from __future__ import annotations

import time

from higgs_tune.shards.durable import check_writable
from higgs_tune.train.build import checkpoint_bytes
from higgs_tune.train.estimate import Measured, Planned, memory_of, states_of
from higgs_tune.train.metrics import PeakMemory, max_memory_gb
from higgs_tune.train.model.memory import FREE_SHARE, free_bytes
from higgs_tune.train.state import Run, StepStats
from higgs_tune.train.step import take_batches, train_step

STEPS = 2


def dry_run(run: Run) -> None:
    """Take two steps and print what the run will need."""
    check_writable(run.config.output_dir.parent, 3 * checkpoint_bytes(run))
    stats, step_s, free = run.new_stats(), 0.0, free_bytes(run.context.device)
    with PeakMemory(run.context.device) as memory:
        for _ in range(STEPS):
            batches, own_counts = take_batches(run, stats)
            began = time.perf_counter()
            norm = train_step(run, batches, run.context.all_sum(own_counts), stats)
            float(norm)  # wait for the device
            step_s = time.perf_counter() - began
    run.bad_steps.collect(until=run.progress.step)
    if run.context.is_main:
        lines = [*_memory_lines(run, stats, memory.more_gb * 1e9, free), *_time_lines(run, stats, step_s)]
        print("\n".join(lines), flush=True)
    run.loader.close()


def _memory_lines(run: Run, stats: StepStats, added: float, free: float) -> list[str]:
    """Memory by part, estimated and measured; the largest pack that fits, by what was measured.

    Args:
        added: bytes that the steps took beyond what was there. free: bytes that were free before them.
    """
    packs = STEPS * run.config.optim.gradient_accumulation_steps
    positions, audio = stats.positions / packs, stats.audio_rows / max(1, stats.positions)
    ranks = run.context.world.size if run.config.lora.full_finetune else 1
    states = states_of(run.config, run.peft_model, ranks)
    mode = run.exec_options.checkpointing
    planned = Planned(run.model, run.peft_model, states, ranks)
    of_pack = {"positions": positions, "text_share": 1 - audio, "windows": stats.windows / max(1, stats.positions)}
    estimate = memory_of(run.config, planned, mode, **of_pack, reserve=0.0)
    measured = Measured(states.frozen, states.trained, added, max_memory_gb(run.context.device) * 1e9)
    of_states = states.gradients + states.moments
    a_position = max(1.0, added - of_states) / max(1.0, positions)
    largest = int(max(0.0, FREE_SHARE * free - of_states) / a_position)
    return [
        f"dry run: memory of a rank, packs of {positions:,.0f} positions, --activation_checkpointing {mode}:",
        *estimate.lines(measured),
        f"largest pack that fits, by what was measured: about {largest:,} positions; {free / 1e9:.1f} GB were free",
    ]


def _time_lines(run: Run, stats: StepStats, step_s: float) -> list[str]:
    """Speed, steps, hours and disk, by the second step."""
    world, accumulation = run.context.world.size, run.config.optim.gradient_accumulation_steps
    hours = run.total_steps * step_s / 3600
    kept = run.config.checkpoints.save_total_limit or run.total_steps // max(1, run.config.checkpoints.save_steps)
    disk = (kept + 2) * checkpoint_bytes(run) / 1e9
    device = "GPU" if run.context.device.type == "cuda" else "process"
    packs = len(run.schedule.plan(0))
    return [
        f"speed: {stats.positions / STEPS / step_s:,.0f} tokens/s a {device} (measured in one step of {accumulation} "
        f"packs); set: {packs:,} packs",
        f"dry run: {run.total_steps} steps of {step_s:.2f} s, about {hours:.2f} h; {hours * world:.2f} {device} hours; "
        f"{max_memory_gb(run.context.device):.1f} GB of memory so far; about {disk:.2f} GB of disk for {kept} "
        "checkpoints, the best and one being written. Nothing was saved.",
    ]
